"""LoRA-XS: a small matrix between W0's own singular vectors (arXiv 2405.17604).

  h = x W0 + alpha / r * x A R B,   A = U_r S_r,   B = V_r^T

of the truncated singular value decomposition W0 = U S V^T, with kernels as they
lie here, (in x out). A (in x r) and B (r x out) are frozen, and R (r x r) alone
is trained: its size has nothing to do with the layer's. No layer has more
singular vectors than its smaller width, which is then r.

A and B are never stored: they are computed again from the base, which an
adapter's file knows by its fingerprint. A pair of singular vectors may have
either sign; here the entry of U's with the largest magnitude is positive, so
that R means the same whoever decomposes. That it does where two singular values
are equal, no rule could say.

The paper draws R from N(0, 1e-5^2). Here it starts at 0 unless `init_std` says
otherwise, so that the first output is exactly the base's; the gradient of R
isn't 0 there.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from vera_jax.adapters.interface import (
  Adapter,
  Leaves,
  LowRank,
  Path,
  Site,
  Target,
  as_they_are,
)
from vera_jax.adapters.products import add_low_rank
from vera_jax.adapters.table import LoraXsSettings as Settings
from vera_jax.adapters.table import lora_xs as lora_xs

R = "lora_xs_R"


def make_lora_xs(s: Settings) -> Adapter:
  """LoRA-XS as an `Adapter`: r * r trained numbers per site."""

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    """A and B of every site, from its kernel."""
    matrices: dict[Path, Array] = {}
    for path, site in sites.items():
      assert isinstance(site, Site)  # widths alone have no singular vectors
      kernel = site.kernel().astype(jnp.float32)
      if any((split := jax.typeof(kernel).sharding).spec):
        # split over a mesh of explicit axes: a decomposition needs all of it
        whole = NamedSharding(split.mesh, PartitionSpec())
        kernel = jax.sharding.reshard(kernel, whole)
      U, S, V = jnp.linalg.svd(kernel, full_matrices=False)
      U, S, V = U[..., : s.rank], S[..., None, : s.rank], V[..., : s.rank, :]
      largest = jnp.argmax(abs(U), axis=-2, keepdims=True)
      sign = jnp.sign(jnp.take_along_axis(U, largest, axis=-2))  # (..., 1, r)
      matrices[*path, "A"] = sign * U * S
      matrices[*path, "B"] = jnp.swapaxes(sign, -1, -2) * V
    return unflatten_dict(matrices)

  def start(key: Array, site: Site) -> dict[str, Array]:
    r = min(s.rank, site.inputs, site.outputs)
    return {R: s.init_std * jax.random.normal(key, (r, r), jnp.float32)}

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    up = (s.alpha / s.rank) * leaves[R] @ site.shared["B"]
    return LowRank(down=site.shared["A"], up=up, trains_up=True)

  return Adapter(
    name="lora_xs",
    shared=shared,
    from_base=True,
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )
