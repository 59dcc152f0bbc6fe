"""Tensors of numbered layers as few stacked ones, for short file headers.

A file's header names each tensor in some hundred bytes, which for a deep
model's biases is more than 16 KiB. One tensor for a run of layers, under
`encoder.layer.0-23.output.dense.bias`, says the same.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from vera_jax.errors import UserError

Tensors = dict[str, np.ndarray]
ONE = re.compile(r"(.*?\.)(\d+)(\..+)")
RUN = re.compile(r"(.*?\.)(\d+)-(\d+)(\..+)")


def stack_layers(tensors: Mapping[str, np.ndarray]) -> Tensors:
  """Consecutive layers' equal tensors as one, the layers along axis 0."""
  stacked: Tensors = {}
  roles: dict[tuple, dict[int, np.ndarray]] = {}
  for name, value in tensors.items():
    if match := ONE.fullmatch(name):
      role = match[1], match[3], value.shape, value.dtype
      roles.setdefault(role, {})[int(match[2])] = value
    else:
      stacked[name] = value
  for (before, after, *_), layers in roles.items():
    for run in _runs(layers):
      name = f"{before}{run[0]}-{run[-1]}{after}"
      stacked[name] = np.stack([layers[number] for number in run])
  return stacked


def _runs(numbers: Iterable[int]) -> list[list[int]]:
  """[0, 1, 2, 5] -> [[0, 1, 2], [5]]"""
  runs: list[list[int]] = []
  for number in sorted(numbers):
    if not runs or runs[-1][-1] + 1 != number:
      runs.append([])
    runs[-1].append(number)
  return runs


def unstack_layers(stacked: Mapping[str, np.ndarray]) -> Tensors:
  """The inverse; a tensor that names no run of layers stays as it is.

  Raises:
    UserError: a tensor has not the layers that its name says.
  """
  tensors: Tensors = {}
  for name, value in stacked.items():
    match = RUN.fullmatch(name)
    if match is None:
      tensors[name] = value
      continue
    numbers = range(int(match[2]), int(match[3]) + 1)
    if value.shape[:1] != (len(numbers),):
      raise UserError(
        f"{name} has shape {value.shape}, but its name says {len(numbers)}"
        " layers."
      )
    for number, layer in zip(numbers, value, strict=True):
      tensors[f"{match[1]}{number}{match[4]}"] = layer
  return tensors
