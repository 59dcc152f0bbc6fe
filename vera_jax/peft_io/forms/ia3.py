"""PEFT's IA3: one tensor per layer, a row for inputs, a column for outputs."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from vera_jax.peft_io.base import Layer, module_list
from vera_jax.peft_io.forms.form import (
  Exported,
  Fields,
  Form,
  Ours,
  Settings,
)
from vera_jax.peft_io.tensors import Tensors


def take(
  ending: str, value: np.ndarray, names: Mapping[str, str]
) -> tuple[str, np.ndarray]:
  del ending, names
  of_inputs = value.shape[:1] == (1,)
  return "ia3_in" if of_inputs else "ia3_out", value.reshape(-1)


def feedforward(
  adapted: Mapping[str, Tensors],
  layers: Mapping[str, Layer],
  patterns: Callable[[Collection[Any]], list[str]],
) -> Settings:
  scaled = {layers[name].kind for name in adapted if "ia3_in" in adapted[name]}
  return {"feedforward": patterns(scaled)}


def write(ours: Ours) -> Exported:
  """Our adapter as PEFT's IA3."""
  scaled = [name for name in ours.leaves if "ia3_in" in ours.leaves[name]]
  leaves: dict[str, Tensors] = {}
  for module, tensors in ours.leaves.items():
    (value,) = tensors.values()
    shape = (1, -1) if module in scaled else (-1, 1)
    leaves[module] = {"ia3_out": value.reshape(shape)}
  fields: Fields = {"feedforward_modules": module_list(scaled, ours.layers)}
  return Exported(leaves, fields)


IA3 = Form(
  endings={"ia3_l": "ia3_out"},
  fields=frozenset({"feedforward_modules", "init_ia3_weights"}),
  settings=lambda fields: ("ia3", {}),
  write=write,
  take=take,
  more=feedforward,
  unchanged=lambda settings: {"ia3_in": 1, "ia3_out": 1},
)
