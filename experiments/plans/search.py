"""The largest batch that fits, in as few compilations as possible."""

from collections.abc import Callable

MOST = 2**16  # rows per chip that are never exceeded


def largest(
  use: Callable[[int], int | None],
  room: int,
  *,
  start: int = 1,
  within: float = 0.125,
) -> int:
  """The most rows that fit, by doubling and bisection with a good guess.

  Memory grows roughly in proportion to the rows. So each try is where the line
  through the last two row counts that fit meets `room`; where that lies outside
  the bounds known so far, the rows are doubled, or the gap is halved.

  Args:
    use: bytes that so many rows need, or None where they can't be compiled.
    room: bytes that there are.
    start: rows to try first.
    within: how near the answer is to the first that doesn't fit, as a fraction.

  Returns:
    rows, or 0 where even one row does not fit.
  """
  before, good = (0, 0), (0, 0)  # (rows, bytes) of the last two that fit
  rows, bad = start, MOST + 1
  while True:
    need = use(rows)
    if need is not None and need <= room:
      before, good = good, (rows, need)
    else:
      bad = rows
    most, used = good
    step = max(1, int(within * most))
    if bad - most <= step or most == MOST:
      return most
    if most == 0:
      rows = bad // 2
      continue
    slope = max(1.0, (used - before[1]) / (most - before[0]))
    met = most + int((room - used) / slope)
    if bad > MOST:
      rows = min(max(most + step, met), MOST)
    elif met < bad:
      rows = min(max(most + step, met), bad - 1)
    else:
      rows = (most + bad) // 2
