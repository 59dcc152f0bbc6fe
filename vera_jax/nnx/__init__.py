"""Adapters on models of flax.nnx, with the methods and files of the package.

adapt         put an adapter on a model, in place
find_targets  the layers that patterns match
training      random numbers and penalties of methods that have them
merge         the plain model with the adapted weights
remove        take the adapter off again
reference     the model as it is now, which training leaves as it is
"""

from vera_jax.nnx.adapt import (
  adapt,
  find_targets,
  merge,
  reference,
  remove,
  training,
)
from vera_jax.nnx.files import load, save, to_lora
from vera_jax.nnx.files import table as summary
from vera_jax.nnx.layers import Projection

__all__ = [
  "Projection",
  "adapt",
  "find_targets",
  "load",
  "merge",
  "reference",
  "remove",
  "save",
  "summary",
  "to_lora",
  "training",
]
