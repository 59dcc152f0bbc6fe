"""The paper's Table 1, computed: parameters and bytes of LoRA and VeRA.

From the adapters' own shapes, without weights: what an adapter has of a layer
is asked of the adapter. The paper's formulas are L (d + r) for VeRA, 2 L d r
for LoRA (section 3.2), with L adapted layers of width d; float32.
"""

from typing import Any, NamedTuple

import pandas as pd

from vera_jax.adapters.apply import adapter_size
from vera_jax.adapters.interface import Target
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera

BYTES = 4  # of a float32
RANKS = (1, 16, 256)
KIB, MIB, GIB = 2**10, 2**20, 2**30


class Model(NamedTuple):
  """A transformer, of which two square projections a layer are adapted."""

  name: str
  layers: int
  width: int


MODELS = (
  Model("RoBERTa-base", 12, 768),
  Model("RoBERTa-large", 24, 1024),
  Model("GPT-3", 96, 12288),
)


class Printed(NamedTuple):
  """The paper's numbers, with the unit of their last digit.

  `parameters` and `bytes` as printed; `p_digit` and `b_digit` are what one
  more in the last printed place would add.
  """

  parameters: float
  p_digit: float
  bytes: float
  b_digit: float


def _row(p: float, p_unit: float, b: float, b_unit: float, digits: int = 0):
  return Printed(p * p_unit, 0.1 * p_unit, b * b_unit, 10**-digits * b_unit)


PRINTED = {
  ("RoBERTa-base", "lora", 1): _row(36.8, 1e3, 144, KIB),
  ("RoBERTa-base", "lora", 16): _row(589.8, 1e3, 2, MIB),
  ("RoBERTa-base", "lora", 256): _row(9437.1, 1e3, 36, MIB),
  ("RoBERTa-base", "vera", 1): _row(18.4, 1e3, 72, KIB),
  ("RoBERTa-base", "vera", 16): _row(18.8, 1e3, 74, KIB),
  ("RoBERTa-base", "vera", 256): _row(24.5, 1e3, 96, KIB),
  ("RoBERTa-large", "lora", 1): _row(98.3, 1e3, 384, KIB),
  ("RoBERTa-large", "lora", 16): _row(1572.8, 1e3, 6, MIB),
  ("RoBERTa-large", "lora", 256): _row(25165.8, 1e3, 96, MIB),
  ("RoBERTa-large", "vera", 1): _row(49.2, 1e3, 192, KIB),
  ("RoBERTa-large", "vera", 16): _row(49.5, 1e3, 195, KIB),
  ("RoBERTa-large", "vera", 256): _row(61.4, 1e3, 240, KIB),
  ("GPT-3", "lora", 1): _row(4.7, 1e6, 18, MIB),
  ("GPT-3", "lora", 16): _row(75.5, 1e6, 288, MIB),
  ("GPT-3", "lora", 256): _row(1207.9, 1e6, 4.6, GIB, 1),
  ("GPT-3", "vera", 1): _row(2.4, 1e6, 9.1, MIB, 1),
  ("GPT-3", "vera", 16): _row(2.8, 1e6, 10.5, MIB, 1),
  ("GPT-3", "vera", 256): _row(8.7, 1e6, 33, MIB),
}


def targets(model: Model) -> dict[tuple[str, ...], Target]:
  """Query and key of every layer, as the table has it."""
  square = Target(model.width, model.width, (model.layers,))
  return {("layer", name): square for name in ("query", "key")}


def parameters(method: str, model: Model, rank: int) -> int:
  """Trained numbers, counted from the adapter's own leaves."""
  adapter = vera(rank) if method == "vera" else lora(rank)
  return adapter_size(adapter, targets(model))


def table1() -> pd.DataFrame:
  """Ours beside the printed numbers, and where those contradict the formula.

  A printed number contradicts when it is further off than one in its last
  digit, so that rounded and cut numbers both pass.
  """
  return pd.DataFrame(
    [
      _compared(model, method, rank)
      for model in MODELS
      for rank in RANKS
      for method in ("lora", "vera")
    ]
  )


def _compared(model: Model, method: str, rank: int) -> dict[str, Any]:
  count, printed = (
    parameters(method, model, rank),
    PRINTED[model.name, method, rank],
  )
  size = BYTES * count
  wrong = abs(printed.parameters - count) > printed.p_digit
  wrong_bytes = abs(printed.bytes - size) > printed.b_digit
  return {
    "model": model.name,
    "rank": rank,
    "method": method,
    "parameters": count,
    "bytes": size,
    "paper_parameters": printed.parameters,
    "paper_bytes": printed.bytes,
    "parameters_contradict": wrong,
    "bytes_contradict": wrong_bytes,
  }
