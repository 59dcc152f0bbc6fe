"""DoRA (arXiv 2402.09353): a kernel's direction and its length, apart.

  W' = m * W / |W|,   W = W0 + delta                              (equation 5)

|W| is the length of each output's weights and m, one number per output, starts
at |W0|. The paper's symbols have one per input; its authors' code and PEFT's
have one per output, as here. |W| counts as a constant in the backward pass
(section 4.3). The delta is LoRA's in DoRA and VeRA's in DVoRA (section 5.4):
`magnitude` follows either in a chain.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from vera_jax.adapters.chain import chain
from vera_jax.adapters.interface import Adapter, Leaves, Site
from vera_jax.adapters.lora import make_lora
from vera_jax.adapters.products import along_last
from vera_jax.adapters.table import LoraSettings, VeraSettings
from vera_jax.adapters.table import dora as dora
from vera_jax.adapters.table import dvora as dvora
from vera_jax.adapters.vera import make_vera

M = "magnitude_m"
SCALE = "magnitude_scale"  # m / |W|, in place of m where a bank keeps it


def magnitude() -> Adapter:
  """m * kernel / |kernel| as an `Adapter`: out trained numbers per site."""

  def norm(site: Site) -> Float[Array, " o"]:
    return jnp.linalg.norm(site.kernel().astype(jnp.float32), axis=0)

  def scale(leaves: Leaves, site: Site) -> Float[Array, " o"]:
    if SCALE in leaves:
      return leaves[SCALE]
    length = jax.lax.stop_gradient(norm(site))
    # an output whose weights are all 0 has no direction, and m = 0
    return leaves[M] / jnp.where(length > 0, length, 1)

  def weights(leaves: Leaves, site: Site) -> tuple[Array, Array | None]:
    return site.kernel() * scale(leaves, site)[None], site.bias

  def forward(
    leaves: Leaves, site: Site, x: Array, key: Any, inner: Any
  ) -> tuple[Array, None]:
    del key
    y = inner(x)
    factor = along_last(scale(leaves, site), y)
    scaled = y * factor  # in float32
    if site.bias is not None:  # it is in y, and is not scaled
      scaled += (1 - factor) * along_last(site.bias, y)
    return scaled.astype(y.dtype), None

  return Adapter(
    name="magnitude",
    init=lambda key, site: {M: norm(site)},
    weights=weights,
    forward=forward,
    draws=False,
    prepare=lambda leaves, site: {SCALE: scale(leaves, site)},
  )


def make_dora(s: LoraSettings) -> Adapter:
  """DoRA: LoRA with a magnitude, r (in + out) + out numbers per site."""
  return chain(make_lora(s), magnitude())


def make_dvora(s: VeraSettings) -> Adapter:
  """DVoRA: VeRA with a magnitude, r + 2 out numbers per site."""
  return chain(make_vera(s), magnitude())
