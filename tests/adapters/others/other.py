"""What the examination of `benchmarks/others.py` is given of a model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from vera_jax.adapters.interface import EMPTY


class Other(NamedTuple):
  """A model written after someone else's source.

  Attributes:
    origin: the repository, and the classes there.
    model: small.
    args, kwargs: of its call.
    streams: of random numbers that its call needs.
    axes: how many axes of a kernel are inputs, or which ones, by a pattern over
      the paths of layers. Of a kernel that no pattern names all axes but the
      last are inputs. From the source, not from the code under examination.
  """

  origin: str
  model: nn.Module
  args: tuple[Any, ...]
  kwargs: Mapping[str, Any] = EMPTY
  streams: tuple[str, ...] = ()
  axes: Mapping[str, int | tuple[int, ...]] = EMPTY


HEADS = {"(query|key|value|to_q|to_k|to_v)": 1}  # one axis in, two out


def normal(*shape: int) -> np.ndarray:
  """Inputs, the same at every call."""
  return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def ids(*shape: int, below: int) -> np.ndarray:
  return np.random.default_rng(4).integers(0, below, shape)
