"""The largest batch that fits, in as few compiles as may be."""

from collections.abc import Callable

MOST = 2**16  # rows a chip that are never passed


def largest(
  use: Callable[[int], int | None],
  room: int,
  *,
  start: int = 1,
  within: float = 0.125,
) -> int:
  """The most rows that fit, by doubling and bisection with a good guess.

  Memory grows about as the rows do. So each try is where the line through the
  last two that fit meets `room`; where that leads outside of what is known, the
  rows are doubled, or the gap is halved.

  Args:
    use: bytes that so many rows need, or None where they can't be compiled.
    room: bytes that there are.
    start: rows to try first.
    within: how near the answer is to the first that doesn't fit, as a share.

  Returns:
    rows, or 0 where one alone is too many.
  """
  seen = [(0, 0)]
  rows, bad = start, MOST + 1
  while True:
    need = use(rows)
    if need is not None and need <= room:
      seen.append((rows, need))
    else:
      bad = rows
    good = seen[-1][0]
    if bad - good <= max(1, int(within * good)) or good == MOST:
      return good
    rows = min(_guess(seen, room, bad, within), MOST)


def _guess(
  seen: list[tuple[int, int]], room: int, bad: int, within: float
) -> int:
  """Rows to try next, between the last that fit and the first that didn't."""
  (before, used), (good, need) = ([(0, 0)] * 2 + seen)[-2:]
  if good == 0:
    return bad // 2
  slope = max(1.0, (need - used) / (good - before))
  met = good + int((room - need) / slope)
  nearest = good + max(1, int(within * good))
  if bad > MOST:
    return max(nearest, met)
  return min(max(nearest, met), bad - 1) if met < bad else (good + bad) // 2
