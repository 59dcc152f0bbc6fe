"""IA3: Infused Adapter by Inhibiting and Amplifying Inner Activations
(arXiv 2205.05638, section 3.3), one trained scale per activation.

  keys and values:         h = l * (W0 x + bias)
  feed-forward's output:   h = W0 (l * x) + bias

l starts at 1. The paper scales each layer's keys, values and what enters the
feed-forward's second product: 2 x 768 + 3072 numbers in a layer of BERT-base,
55,296 in all. PEFT's own defaults for BERT name "output.dense", by which they
also scale the inputs of the attention's output layer; the paper doesn't.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from vera_jax.adapters.interface import Adapter, Leaves, Site, as_they_are
from vera_jax.adapters.products import along_last
from vera_jax.adapters.sites import matches
from vera_jax.adapters.table import Ia3Settings as Settings
from vera_jax.adapters.table import ia3 as ia3

INPUT, OUTPUT = "ia3_in", "ia3_out"


def make_ia3(s: Settings) -> Adapter:
  """IA3 as an `Adapter`: in or out trained numbers per site."""

  def start(key: Array, site: Site) -> dict[str, Array]:
    del key
    if any(matches(pattern, site.path) for pattern in s.feedforward):
      return {INPUT: jnp.ones(site.inputs, jnp.float32)}
    return {OUTPUT: jnp.ones(site.outputs, jnp.float32)}

  def weights(leaves: Leaves, site: Site) -> tuple[Array, Array | None]:
    if INPUT in leaves:
      return leaves[INPUT][:, None] * site.kernel(), site.bias
    scale = leaves[OUTPUT]
    bias = None if site.bias is None else scale * site.bias
    return site.kernel() * scale[None], bias

  def forward(
    leaves: Leaves, site: Site, x: Array, key: Any, inner: Any
  ) -> tuple[Array, None] | None:
    del key
    if INPUT in leaves:
      if not site.view.takes_vectors:
        return None
      # multiplied in float32: bfloat16 would round a scale close to 1
      scaled = x * along_last(leaves[INPUT], x)
      return inner(scaled.astype(x.dtype)), None
    y = inner(x)
    return (y * along_last(leaves[OUTPUT], y)).astype(y.dtype), None

  return Adapter(
    name="ia3",
    init=start,
    weights=weights,
    forward=forward,
    draws=False,
    prepare=as_they_are,
    apart=s.feedforward,
  )
