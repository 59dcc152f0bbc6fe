"""Which row and column each example of a batch goes to."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from vera_jax.errors import UserError

_CHUNK = 2048  # examples of a long split that are placed together
_PASS = 32  # tokens that one more pass must save


class Layout(NamedTuple):
  """The array shapes that packed batches may have.

  Attributes:
    rows: allowed row counts, ascending. A batch that needs more rows than the
      largest takes several passes.
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

  def part(
    self, first: int, rows: int
  ) -> tuple[Int64[np.ndarray, " some"], "Placement"]:
    """The examples of some rows, and where they lie among these."""
    here = np.flatnonzero((self.row >= first) & (self.row < first + rows))
    row, start, slot = (column[here] for column in self)
    return here, Placement(row - first, start, slot)


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


def passes(needed: int, layout: Layout) -> tuple[int, ...]:
  """The row counts of a step's passes, which together hold `needed` rows.

  One pass of any of the layout's counts, and after it as many of the smallest
  count as are wanting.
  """
  small = layout.rows[0]
  main = min(
    layout.rows, key=lambda rows: pass_cost(needed, rows, small, layout.length)
  )
  return (main,) + (small,) * _more(needed, main, small)


def at_most(layout: Layout, rows: int, *, shards: int = 1) -> Layout:
  """The layout with no more rows a pass; long batches take further passes.

  Raises:
    UserError: the rows are fewer than the batch's shards.
  """
  most = rows // shards * shards
  if most == 0:
    raise UserError(
      f"config.optim.pass_rows is {rows}, but a pass has a row at least for"
      f" each of the mesh's {shards} batch shards."
    )
  kept = {min(count, most) for count in layout.rows}
  return layout._replace(rows=tuple(sorted(kept)))


def pass_cost(needed: Any, main: Any, small: int, length: int) -> Any:
  """The tokens of such passes, with a surcharge for each after the first.

  The arguments may be arrays, the result then has their broadcast shape.
  """
  more = _more(needed, main, small)
  return (main + more * small) * length + more * _PASS


def _more(needed: Any, main: Any, small: int) -> Any:
  return np.maximum(-((main - needed) // small), 0)
