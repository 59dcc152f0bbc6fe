"""Packs the examples of a batch into rows: little padding, few shapes.

Short texts share a row. Segment ids keep them apart in attention, and positions
start again with each text, so a packed batch computes exactly what a padded one
would. XLA compiles every array shape anew, hence a `Layout`: one row length and
at most three row counts, chosen from the data before training (`layout.py`). A
batch that needs more rows than the usual microbatch has takes a further one,
whose gradient is added.

An example that asks between choices is several texts, one for each. They lie
in one row, one after another, each a segment of its own.

  row     [CLS] a b [SEP] [CLS] c [SEP]  -   -
  segment   1   1 1   1     2   2   2    0   0
  position  0   1 2   3     0   1   2    0   0

Where the words themselves are learned, a row also has its reads: the columns
whose next token is learned. So many of them as any row has are padded with
weight 0, which is what the output layer is computed for. Such texts may lie in
one long row per shard of the batch, cut to one of a few lengths
(`long_rows.py`).
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64, Shaped

from vera_jax.data.tokens import Tokens

_CHUNK = 2048  # examples of a long split that are placed together
_FURTHER = 32  # cost of one more microbatch beside its rows, in tokens

Batch = dict[str, np.ndarray]


class Layout(NamedTuple):
  """The array shapes that packed batches may have.

  Attributes:
    rows: allowed row counts of a microbatch, ascending. A batch that needs
      more rows than the largest takes several microbatches.
    length: tokens per row.
    slots: most examples in a row.
    reads: most learned tokens in a row, where words are learned.
    sizes: where rows are long ones, the (length, reads) that a microbatch may
      be cut to, ascending up to `length` and `reads`. Then `rows` has one
      count.
  """

  rows: tuple[int, ...]
  length: int
  slots: int
  reads: int = 0
  sizes: tuple[tuple[int, int], ...] = ()

  @property
  def shapes(self) -> list["Layout"]:
    """A layout for each shape that a microbatch may have."""
    sizes = self.sizes or ((self.length, self.reads),)
    return [
      Layout((rows,), length, self.slots, reads)
      for rows in self.rows
      for length, reads in sizes
    ]


class Placement(NamedTuple):
  """Where each example goes: its row, first column, and slot in the row."""

  row: Int64[np.ndarray, " examples"]
  start: Int64[np.ndarray, " examples"]
  slot: Int64[np.ndarray, " examples"]

  @property
  def rows(self) -> int:
    return int(self.row.max(initial=-1)) + 1


class ProcessShard(NamedTuple):
  """The batch rows that this process must supply: those of its devices.

  A batch's rows fall into `of` equal shards, one per device, and the process
  supplies shards `first` to `last` (`last` excluded). The row count of every
  batch is a multiple of `of`.
  """

  first: int = 0
  last: int = 1
  of: int = 1

  def bounds(self, rows: int) -> tuple[int, int]:
    """First row, and the one after the last, in a batch of `rows` rows."""
    return rows * self.first // self.of, rows * self.last // self.of

  def global_rows(self, rows: int) -> int:
    """Rows of the whole batch, of which this process has `rows`."""
    return rows * self.of // (self.last - self.first)


WHOLE = ProcessShard()


def first_fit(
  lengths: Int64[np.ndarray, " examples"],
  layout: Layout,
  *,
  reads: Int64[np.ndarray, " examples"] | None = None,
) -> Placement:
  """Longest first, each into the first row with room; ties in order.

  `reads` are learned tokens of each example, for which a row needs room too.
  """
  if reads is None:
    reads = np.zeros_like(lengths)
  placement = _fit(lengths, layout, reads, rows=None)
  assert placement is not None  # there is always a further row
  return placement


def spread(
  lengths: Int64[np.ndarray, " examples"],
  layout: Layout,
  *,
  reads: Int64[np.ndarray, " examples"],
) -> Placement:
  """Longest first, each into the emptiest row, in few microbatches.

  So the rows of a microbatch are about equally long, and little of them is
  padding once they are cut to the length of the fullest one.
  """
  # A microbatch more at a time, until all examples have room: as many rows as
  # examples always are enough.
  for rows in itertools.count(layout.rows[0], layout.rows[0]):
    placement = _fit(lengths, layout, reads, rows=rows)
    if placement is not None:
      return placement
  raise AssertionError("unreachable")


def _fit(
  lengths: Int64[np.ndarray, " examples"],
  layout: Layout,
  reads: Int64[np.ndarray, " examples"],
  *,
  rows: int | None,
) -> Placement | None:
  """Places the longest example first, where it has room.

  Args:
    rows: the emptiest of so many rows is taken, and where an example has room
      in none of them the result is None. With None the first row that has room
      is taken, or a further one begun.

  Raises:
    ValueError: an example is too long for an empty row.
  """
  if lengths.max(initial=0) > layout.length:
    raise ValueError(f"{lengths.max()} tokens exceed {layout.length} a row")
  if reads.max(initial=0) > layout.reads:
    raise ValueError(
      f"{reads.max()} learned tokens exceed {layout.reads} a row"
    )
  row, start, slot = np.zeros((3, len(lengths)), np.int64)
  # of each row: its tokens, learned tokens and examples so far
  used, read, count = ([0] * (rows or 0) for _ in range(3))
  # Long examples are the hard ones to place; short ones fill what they leave.
  for i in np.argsort(-lengths, kind="stable").tolist():
    length, learned = int(lengths[i]), int(reads[i])
    emptiest = sorted(range(len(used)), key=used.__getitem__) if rows else ()
    for r in emptiest or range(len(used)):
      if (
        used[r] + length <= layout.length
        and count[r] < layout.slots
        and read[r] + learned <= layout.reads
      ):
        break
    else:
      if rows is not None:
        return None
      r = len(used)
      for of_rows in (used, read, count):
        of_rows.append(0)
    row[i], start[i], slot[i] = r, used[r], count[r]
    used[r] += length
    read[r] += learned
    count[r] += 1
  return Placement(row, start, slot)


def place_all(
  lengths: Int64[np.ndarray, " examples"],
  layout: Layout,
  *,
  adapters: Int[np.ndarray, " examples"] | None = None,
  reads: Int64[np.ndarray, " examples"] | None = None,
) -> Placement:
  """`first_fit` over a long split, some thousand examples at a time.

  First fit takes quadratic time, and in chunks of that size it loses no room.

  Args:
    adapters: the adapter of each example. Those of two adapters never share a
      row, so that one number per row says which adapter it runs with
      (`with_adapters`). None: all have the same.
    reads: as for `first_fit`.
  """
  if adapters is None:
    adapters = np.zeros(len(lengths), np.int64)
  # One group of examples for each adapter, in the order of their numbers; a
  # split of one adapter is one group in its own order.
  order = np.argsort(adapters, kind="stable")
  groups = np.split(order, np.flatnonzero(np.diff(adapters[order])) + 1)
  placement = np.zeros((3, len(lengths)), np.int64)
  rows = 0
  for group in groups:
    for start in range(0, len(group), _CHUNK):
      chunk = group[start : start + _CHUNK]
      part = first_fit(
        lengths[chunk],
        layout,
        reads=None if reads is None else reads[chunk],
      )
      # a chunk begins a row of its own, behind those of the chunks before it
      placement[:, chunk] = part.row + rows, part.start, part.slot
      rows += part.rows
  return Placement(*placement)


def microbatch_cost(needed: Any, main: Any, smallest: int, length: int) -> Any:
  """Tokens of a step's microbatches, and a surcharge for each further one.

  The first microbatch has `main` rows, the further ones `smallest`. The
  arguments may be arrays; the result then has their broadcast shape.
  """
  further = np.maximum(-((main - needed) // smallest), 0)
  return (main + further * smallest) * length + further * _FURTHER


def rows_of_microbatches(needed: int, layout: Layout) -> tuple[int, ...]:
  """Row counts of a step's microbatches, which together have `needed` rows.

  One microbatch of any of the layout's counts, whichever is cheapest, and
  after it as many of the smallest count as are still needed.
  """
  smallest = layout.rows[0]
  main = min(
    layout.rows,
    key=lambda rows: microbatch_cost(needed, rows, smallest, layout.length),
  )
  further = max(-((main - needed) // smallest), 0)
  return (main,) + (smallest,) * further


def place_examples(
  tokens: Tokens, layout: Layout, indices: Int[np.ndarray, " examples"]
) -> Placement:
  """`first_fit` of these examples, or in long rows `spread`."""
  lengths = tokens.lengths[indices]
  reads = None if tokens.reads is None else tokens.reads[indices]
  if layout.sizes and reads is not None:
    return spread(lengths, layout, reads=reads)
  return first_fit(lengths, layout, reads=reads)


def fullest_rows(
  lengths: Int64[np.ndarray, " examples"],
  reads: Int64[np.ndarray, " examples"],
  placement: Placement,
  *,
  rows: int,
) -> list[tuple[int, int]]:
  """(tokens, learned tokens) of the fullest row of each microbatch's `rows`."""
  fullest = []
  for first in range(0, placement.rows, rows):
    here = (placement.row >= first) & (placement.row < first + rows)
    learned = np.bincount(placement.row[here], weights=reads[here])
    # a row is as long as the end of its last text
    ends = placement.start[here] + lengths[here]
    fullest.append((int(ends.max()), int(learned.max())))
  return fullest


def cut_layouts(
  tokens: Tokens,
  batches: Sequence[Int[np.ndarray, " _"]],
  placements: Sequence[Placement],
  layout: Layout,
) -> Iterator[Layout]:
  """For each microbatch the layout with the shortest rows that hold it, in
  every run."""
  needs = [
    fullest_rows(
      tokens.lengths[indices],
      tokens.reads[indices],
      placement,
      rows=layout.rows[0],
    )
    for indices, placement in zip(batches, placements, strict=True)
    if tokens.reads is not None
  ]
  # Runs of an ensemble share a program, so the shape must hold the fullest row
  # of any of them; a run that has no such microbatch needs nothing.
  for of_runs in itertools.zip_longest(*needs, fillvalue=(0, 0)):
    length, reads = map(max, zip(*of_runs, strict=True))
    yield next(
      shape
      for shape in layout.shapes
      if shape.length >= length and shape.reads >= reads
    )


def pack_runs(
  tokens: Tokens,
  batches: Sequence[Int[np.ndarray, " _"]],
  layout: Layout,
  *,
  shard: ProcessShard = WHOLE,
) -> list[tuple[Batch, ...]]:
  """Packs a step's examples: one microbatch, or more for a long batch.

  Several runs' batches are packed each by itself, in the shapes that the
  largest needs. A run that needs fewer rows than another has empty rows at the
  end, and one that needs fewer microbatches has empty ones.

  Returns:
    for each run and microbatch, with a row count of the layout,
    int32 [rows, length] `input_ids`, `token_type_ids`, `positions` (from 0 in
    each text) and `segment_ids` (from 1 in each row, 0 for padding);
    [rows, slots * choices] `cls_positions` (the column of a text's first token;
    those of an example's choices follow one another);
    [rows, slots] `example` (its index into `tokens`; -1 for an empty slot),
    `labels` (as the tokens have them; 0 in an empty slot or without labels) and
    float32 `weights` (1 for an example, 0 in an empty slot). For texts given as
    words, labels and weights are [rows, length], of the tokens that words begin
    with. Where words are learned there are no `cls_positions` or types, but
    [rows, reads] `read_positions` (the columns whose next token is learned, in
    order), `labels` (that token) and `weights`.
  """
  # Each run's examples are placed as if it were alone, so that an ensemble
  # trains on the batches of its runs.
  placements = [place_examples(tokens, layout, indices) for indices in batches]
  counts = [
    rows_of_microbatches(placement.rows, layout) for placement in placements
  ]
  # Then all runs get the shapes of the largest, since one program steps them.
  shapes = [max(rows) for rows in itertools.zip_longest(*counts, fillvalue=0)]
  layouts = [layout] * len(shapes)
  if layout.sizes:
    layouts = list(cut_layouts(tokens, batches, placements, layout))
  packed = []
  for indices, placement, used_rows in zip(
    batches, placements, counts, strict=True
  ):
    first, microbatches = 0, []
    # a run without a microbatch has none of its rows, but the same arrays
    used_rows = (*used_rows, *[0] * (len(shapes) - len(used_rows)))
    for rows, used, shape in zip(shapes, used_rows, layouts, strict=True):
      microbatches.append(
        pack_rows(
          tokens,
          indices,
          placement,
          shape,
          first=first,
          last=first + used,
          rows=rows,
          shard=shard,
        )
      )
      first += used
    packed.append(tuple(microbatches))
  return packed


def pack_rows(
  tokens: Tokens,
  indices: Int[np.ndarray, " examples"],
  placement: Placement,
  layout: Layout,
  *,
  first: int,
  last: int,
  rows: int,
  shard: ProcessShard = WHOLE,
) -> Batch:
  """The arrays of the placement's rows from `first` to before `last`.

  Args:
    indices: the examples of `tokens` that `placement` places.
    rows: how many the microbatch has; those beyond the placement's stay empty.
    shard: only these of the microbatch's rows are made.
  """
  # Only this process's rows are made, so they are numbered from its first one.
  low, high = shard.bounds(rows)
  rows = high - low
  here = (placement.row >= first + low) & (
    placement.row < min(first + high, last)
  )
  row, start, slot = (column[here] for column in placement)
  row = row - first - low
  indices, choices = indices[here], tokens.choices
  # From here on all is index arithmetic over flat arrays, without a loop over
  # texts or tokens: batches are packed while a step runs, in one thread.
  # One entry per text: its number, its row, first column and slot.
  texts = (indices[:, None] * choices + np.arange(choices)).ravel()
  lengths, offsets = tokens.text_lengths[texts], tokens.offsets[texts]
  text_row = np.repeat(row, choices)
  text_start = np.repeat(start - tokens.offsets[indices * choices], choices)
  text_start += offsets  # behind the example's choices before this one
  text_slot = (slot[:, None] * choices + np.arange(choices)).ravel()
  # One entry per token: its number within the text, its index in the tokens'
  # flat array, and its index in the flattened rows.
  before = np.cumsum(lengths) - lengths
  within = np.arange(lengths.sum()) - np.repeat(before, lengths)
  source = np.repeat(offsets, lengths) + within
  target = np.repeat(text_row * layout.length + text_start, lengths) + within

  def in_rows(
    values: np.ndarray, empty: int = 0, dtype: Any = np.int32
  ) -> np.ndarray:
    flat = np.full(rows * layout.length, empty, dtype)
    flat[target] = values
    return flat.reshape(rows, layout.length)

  def in_slots(values: np.ndarray, empty: int = 0) -> np.ndarray:
    shape = (rows, layout.slots, *values.shape[1:])
    grid = np.full(shape, empty, values.dtype)
    grid[row, slot] = values
    return grid

  packed = {
    "input_ids": in_rows(tokens.ids[source], tokens.pad_id),
    "positions": in_rows(within),
    "segment_ids": in_rows(np.repeat(text_slot + 1, lengths)),
    "example": in_slots(indices.astype(np.int32), -1),
  }
  if tokens.learned is not None:
    learned_columns = target[tokens.learned[source]]
    return packed | _reads(packed["input_ids"], learned_columns, layout.reads)
  cls_positions = np.zeros((rows, layout.slots * choices), np.int32)
  cls_positions[text_row, text_slot] = text_start
  labels = tokens.labels
  if tokens.words is None:
    if labels is None:
      labels = np.zeros(len(tokens), np.int32)
    learned = {
      "labels": in_slots(labels[indices]),
      "weights": in_slots(np.ones(len(indices), np.float32)),
    }
  else:
    if labels is None:
      labels = np.zeros(len(tokens.ids), np.int32)
    begins = tokens.words[source] >= 0
    learned = {
      "labels": in_rows(labels[source]),
      "weights": in_rows(begins, dtype=np.float32),
    }
  return {
    **packed,
    "token_type_ids": in_rows(tokens.token_types[source]),
    "cls_positions": cls_positions,
    **learned,
  }


def _reads(
  ids: Int32[np.ndarray, "rows length"],
  learned: Int64[np.ndarray, " learned"],
  reads: int,
) -> Batch:
  """Where learned tokens are read: one column before their own.

  Args:
    ids: the packed rows' tokens.
    learned: the indices of learned tokens in the flattened rows.
    reads: how many a row has at most.
  """
  row, column = np.divmod(np.sort(learned), ids.shape[1])
  read = np.arange(len(row)) - np.searchsorted(row, row)
  shape = (len(ids), reads)
  positions, words = np.zeros((2, *shape), np.int32)
  weights = np.zeros(shape, np.float32)
  positions[row, read] = column - 1
  words[row, read] = ids[row, column]
  weights[row, read] = 1
  return {"read_positions": positions, "labels": words, "weights": weights}


def per_token(
  rows: Shaped[np.ndarray, "rows length ..."],
  tokens: Tokens,
  placement: Placement,
) -> Shaped[np.ndarray, "ids ..."]:
  """What packed rows hold for each token, in the order of `tokens.ids`."""
  lengths = tokens.lengths
  within = np.arange(lengths.sum()) - np.repeat(tokens.offsets[:-1], lengths)
  column = np.repeat(placement.start, lengths) + within
  return rows[np.repeat(placement.row, lengths), column]


def with_adapters(
  batch: Batch, adapters: Int[np.ndarray, " examples"]
) -> Batch:
  """The batch with int32 [rows] `adapter`; -1 in a row without examples.

  `adapters` has an entry for every example of the split.
  """
  first = batch["example"][:, 0]  # a row's slots are filled from the left
  adapter = np.where(first >= 0, adapters[first], -1).astype(np.int32)
  return {**batch, "adapter": adapter}


def pack_by_adapter(
  tokens: Tokens,
  indices: Int[np.ndarray, " batch"],
  adapters: Int[np.ndarray, " examples"],
  layout: Layout,
) -> Batch:
  """Packs a training batch of several adapters into one microbatch.

  Args:
    tokens: a split.
    indices: the examples of the batch.
    adapters: the adapter of every example of the split, by its number in the
      bank (`AdapterBank.slots`).
    layout: its largest row count must be enough; as many rows as examples
      always are.

  Raises:
    ValueError: the layout has too few rows.
  """
  placement = place_all(
    tokens.lengths[indices], layout, adapters=adapters[indices]
  )
  rows = next((rows for rows in layout.rows if rows >= placement.rows), None)
  if rows is None:
    raise ValueError(f"{placement.rows} rows are needed, {layout} has fewer")
  batch = pack_rows(
    tokens, indices, placement, layout, first=0, last=rows, rows=rows
  )
  return with_adapters(batch, adapters)
