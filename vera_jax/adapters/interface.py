"""What an adapter method is: a few pure functions.

`apply.adapt` puts one on any linen model, `merge.merge` folds one into the
kernels, and neither knows which method it holds. `vera.vera` and `lora.lora`
are the two instances.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

Path = tuple[str, ...]
Leaves = Mapping[str, Array]


class Target(NamedTuple):
  """An adapted layer: its flat input and output widths.

  `stack` is () for a layer of its own and (layers,) under `nn.scan`, where one
  parameter holds all layers.
  """

  inputs: int
  outputs: int
  stack: tuple[int, ...] = ()

  @property
  def layers(self) -> int:
    return math.prod(self.stack)


class Adapter(NamedTuple):
  """An adapter method.

  Attributes:
    name: prefix of its parameters' names.
    projections: all targets, by path -> the non-trainable `projections`
      collection; matrices at its root serve every layer, those at a layer's
      path serve that layer.
    init: a layer's (inputs, outputs) -> its trainable leaves by name, each as a
      function of a key.
    forward: (leaves, projections, x of (..., inputs), kernel of (inputs,
      outputs)) -> x times the adapted kernel, (..., outputs). With None for the
      kernel and `outputs`, only what the adapter adds to the layer's output.
    kernel: (leaves, projections, inputs, outputs) -> what the adapter adds to
      the kernel, (inputs, outputs).
    plan: (tokens, inputs, outputs) -> how `forward` multiplies, a name in
      `contraction.PLANS`.
  """

  name: str
  projections: Callable[[Mapping[Path, Target]], dict[str, Any]]
  init: Callable[[int, int], dict[str, Callable[[Array], Array]]]
  forward: Callable[..., Array]
  kernel: Callable[..., Array]
  plan: Callable[[int, int, int], str]
