"""GELU (arXiv 1606.08415), exact, of which the backward pass needs x alone.

gelu(x) = x Φ(x), where Φ is the normal distribution's function. Differentiated
by rule, it would keep x, Φ(x) and the density. Its slope is Φ(x) + x Φ'(x).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x Φ(x), computed in float32 or what is finer."""
  wide = _wide(x)
  # by erf, as torch does; erfc is right further in the tail, and slower
  below = 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
  return (wide * below).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  wide = _wide(x)
  # Not the forward pass's erf(x): XLA would keep that for here, and x as well.
  below = 0.5 * (1 - jax.lax.erf(wide * -math.sqrt(0.5)))
  density = jnp.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
  slope = (below + wide * density).astype(x.dtype)
  return gelu(x), tangent * slope


def _wide(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
