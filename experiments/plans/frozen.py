"""The frozen network, beside which methods are counted."""

from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vera_jax.adapters.interface import Adapter, Leaves, Site


def column_bias() -> Adapter:
  """An adapter that adds one number to each output.

  Its gradient needs that of the layer's output, but not the layer's input: the
  least that any adapter of the layer can cost.
  """

  def weights(leaves: Leaves, site: Site) -> Any:
    added = leaves["column_bias"]
    return site.kernel(), added if site.bias is None else site.bias + added

  return Adapter(
    name="column",
    init=lambda key, site: {"column_bias": jnp.zeros(site.outputs)},
    weights=weights,
  )


def frozen_network(config: ConfigDict) -> dict[str, Any]:
  """What the model has in place of its config's method: the bias on VeRA's
  targets."""
  return {"adapter": (column_bias(), tuple(config.vera.targets))}
