"""Which row and column each example of a batch goes to."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

_CHUNK = 2048  # examples of a long split that are placed together


class Layout(NamedTuple):
  """The array shapes that packed batches may have.

  Attributes:
    rows: allowed row counts, ascending.
    length: tokens a row.
    slots: most examples in a row.
  """

  rows: tuple[int, ...]
  length: int
  slots: int


class Placement(NamedTuple):
  """Where each example goes: its row, first column, and place in the row."""

  row: Int64[np.ndarray, " examples"]
  start: Int64[np.ndarray, " examples"]
  slot: Int64[np.ndarray, " examples"]

  @property
  def rows(self) -> int:
    return int(self.row.max(initial=-1)) + 1


def first_fit(
  lengths: Int64[np.ndarray, " examples"], layout: Layout
) -> Placement:
  """Longest first, each into the first row with room; ties in order."""
  if lengths.max(initial=0) > layout.length:
    raise ValueError(f"{lengths.max()} tokens exceed {layout.length} a row")
  row, start, slot = np.zeros((3, len(lengths)), np.int64)
  used: list[int] = []
  count: list[int] = []
  for i in np.argsort(-lengths, kind="stable").tolist():
    room = layout.length - int(lengths[i])
    for r, taken in enumerate(used):
      if taken <= room and count[r] < layout.slots:
        break
    else:
      r = len(used)
      used.append(0)
      count.append(0)
    row[i], start[i], slot[i] = r, used[r], count[r]
    used[r] += int(lengths[i])
    count[r] += 1
  return Placement(row, start, slot)


def place_all(
  lengths: Int64[np.ndarray, " examples"], layout: Layout
) -> Placement:
  """`first_fit` over a long split, some thousand examples at a time."""
  parts: list[Placement] = []
  rows = 0
  for start in range(0, len(lengths), _CHUNK):
    part = first_fit(lengths[start : start + _CHUNK], layout)
    parts.append(part._replace(row=part.row + rows))
    rows += part.rows
  return Placement(*map(np.concatenate, zip(*parts, strict=True)))
