"""LayerNorm (arXiv 1607.06450) with one array kept for the backward pass.

Differentiated by rule, it would keep the input less its mean, twice, and the
squares' part as well; its own result before scale and bias is enough.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardise(
  x: Float[Array, "*rows width"], epsilon: float
) -> Float[Array, "*rows width"]:
  """Along the last axis of mean 0 and variance 1, but for epsilon."""
  return _standardised(x, epsilon)[0]


@standardise.defjvp
def _standardise_jvp(epsilon, primals, tangents):
  (x,), (tangent,) = primals, tangents
  made, factor = _standardised(x, epsilon)
  along = jnp.mean(tangent * made, -1, keepdims=True)
  moved = tangent - jnp.mean(tangent, -1, keepdims=True) - made * along
  return made, moved * factor


def _standardised(x: Array, epsilon: float) -> tuple[Array, Array]:
  x = x - jnp.mean(x, -1, keepdims=True)
  variance = jnp.mean(jnp.square(x), -1, keepdims=True)
  factor = jax.lax.rsqrt(variance + epsilon)
  return x * factor, factor


class LayerNorm(nn.Module):
  """In float32 or what is finer, with flax's names of scale and bias.

  Attributes:
    epsilon: added to the variance.
    dtype, param_dtype: of what is returned, and of the parameters.
  """

  epsilon: float
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = x.shape[-1:]
    start = nn.initializers
    scale = self.param("scale", start.ones, shape, self.param_dtype)
    bias = self.param("bias", start.zeros, shape, self.param_dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    made = standardise(x.astype(wide), self.epsilon)
    one = (1,) * (x.ndim - 1)
    scale, bias = (
      leaf.astype(wide).reshape(*one, -1) for leaf in (scale, bias)
    )
    return (made * scale + bias).astype(self.dtype)
