"""Which layers are adapted; norms of d and b a layer (Figure 3).

  python -m experiments.sweep --config=configs/sweeps/layers.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/layers.py:minilm ...

RTE on RoBERTa-large, five seeds: query and value (the paper's choice), all
linear layers of the encoder, each kind of layer alone, and query and value of
the lower or the upper half. The layers are looped, not scanned: a pattern must
be able to tell them apart. Figure 3 shows the norm of d on RTE: query above
value, upper layers above lower ones. Others report 0.3 points more for all
linear layers (VB-LoRA's authors, average of six tasks). Not run by us, for want
of RoBERTa's weights.

minilm: SST-2, 1,200 training sentences in batches of 16, three seeds, three
epochs.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import common, minilm, rte
from configs.sweeps import FEWER, SEEDS, cross, product, seeds, sweep

LINEAR = {
  "query": "query",
  "key": "key",
  "value": "value",
  "attention output": "attention/output/dense",
  "intermediate": "intermediate/dense",
  "output": r"layer_\d+/output/dense",
}
LAYERS = {"minilm": 6, "base": 12, "large": 24}


def half(numbers: Iterable[int]) -> tuple[str, ...]:
  """Query and value of these layers."""
  which = "|".join(map(str, numbers))
  return tuple(f"layer_({which})/.*/{name}" for name in ("query", "value"))


def targets(layers: int) -> list[tuple[str, ...]]:
  middle = layers // 2
  return [
    ("query", "value"),
    tuple(LINEAR.values()),
    *((pattern,) for pattern in LINEAR.values()),
    half(range(middle)),
    half(range(middle, layers)),
  ]


def get_config(size: str = "large") -> ConfigDict:
  common.pick(size, base={}, large={}, minilm={})
  choices = product({"vera.targets": targets(LAYERS[size])})
  if size == "minilm":
    base = minilm.brief()
    runs = cross(choices, seeds(FEWER))
    return sweep("Which layers, MiniLM", base, runs)
  base = rte.get_config(size)
  base.model.scan = False
  return sweep("Which layers", base, cross(choices, seeds(SEEDS)))
