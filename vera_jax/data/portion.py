"""Which rows of each batch a process makes: those that its devices hold."""

from typing import NamedTuple


class Portion(NamedTuple):
  """Of a batch's `of` equal shards of rows those from `first` to `last`.

  `last` is not one of them. Every batch has a multiple of `of` rows.
  """

  first: int = 0
  last: int = 1
  of: int = 1

  def bounds(self, rows: int) -> tuple[int, int]:
    """The first of a batch's rows, and the one after the last."""
    return rows * self.first // self.of, rows * self.last // self.of

  def whole(self, rows: int) -> int:
    """The rows of the batch of which this many are here."""
    return rows * self.of // (self.last - self.first)


WHOLE = Portion()
