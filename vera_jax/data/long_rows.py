"""Chooses the lengths of long rows, in which a batch's texts lie end to end.

A decoder's attention costs what the texts need, however long the row
(`operations/bands.py`). So each shard of a batch is one row, with padding only
at its end, and XLA compiles a program for each length that rows are cut to: the
more there are, the less is padded and the longer the compiling. An evaluation
goes through all texts of a split, in batches that are equally full, so one
length does for it.
"""

import numpy as np
from jaxtyping import Int64

from vera_jax.data.layout import round_up, rows_per_shard
from vera_jax.data.packing import Layout, fullest_rows, place_all, spread

_MULTIPLE = 32  # lengths are multiples of it: the blocks of `bands.py`
_READS = 8  # and room for learned tokens is a multiple of that
_SAMPLE = 256  # batches that are looked at
_FEW = 0.1  # of a length's batches learn more than it has room for
# Tokens that a decoder trains on while a shape compiles: SmolLM2-135M with
# stacked layers on two cores, two seconds of 280 tokens.
_COMPILE = 600


def choose_long_rows(
  lengths: Int64[np.ndarray, " examples"],
  reads: Int64[np.ndarray, " examples"],
  *,
  batch_size: int,
  epochs: int = 1,
  shards: int = 1,
  microbatch_rows: int | None = None,
  seed: int = 0,
) -> Layout:
  """Chooses the lengths of a microbatch's rows for random batches.

  Of all sets of lengths the one wins with which the whole run processes the
  fewest tokens, compiling included (as many as are trained on meanwhile).

  Args:
    lengths: how many tokens every example has.
    reads: how many of them are learned.
    batch_size: how many examples a batch has.
    epochs: how often the run sees the examples.
    shards: how many rows a microbatch has: one for each device along "data".
    microbatch_rows: a microbatch has at most as many tokens as so many rows of
      the longest example each; None: a microbatch may hold any batch.

  Raises:
    UserError: there are fewer `microbatch_rows` than shards of the batch.
  """
  batch_size = min(batch_size, len(lengths))
  steps = max(1, epochs * len(lengths) // batch_size)
  most = batch_size
  if microbatch_rows is not None:
    most = min(most, rows_per_shard(microbatch_rows, shards))
  longest = round_up(int(lengths.max()), _MULTIPLE)
  # The lengths follow from what random batches need. So some are placed as
  # training will place them, into rows with room for as much as is allowed.
  roomy = Layout((shards,), most * longest, batch_size, most * longest)
  rng = np.random.default_rng(seed)
  needs = []
  for _ in range(_SAMPLE):
    batch = rng.permutation(len(lengths))[:batch_size]
    placement = spread(lengths[batch], roomy, reads=reads[batch])
    needs += fullest_rows(lengths[batch], reads[batch], placement, rows=shards)
  # The sample may lack the longest example, which a row must hold all the same.
  needs.append((longest, 0))
  tokens, learned = np.array(needs).T
  tokens = round_up(tokens, _MULTIPLE)
  chosen = _choose_lengths(tokens, compiling=_COMPILE / steps)
  # The output layer is computed for as many tokens as a row has room to learn,
  # so a length has room for what nearly all of its microbatches learn; the few
  # others go to the next length. The last one must hold whatever comes.
  sizes, room = [], int(reads.max())
  for length in chosen:
    fitting = learned[tokens <= length]
    last = length == chosen[-1]
    needed = fitting.max() if last else np.quantile(fitting, 1 - _FEW)
    room = max(room, round_up(int(np.ceil(needed)), _READS))
    sizes.append((length, min(room, length)))
  return Layout((shards,), chosen[-1], batch_size, room, tuple(sizes))


def choose_long_eval_rows(
  lengths: Int64[np.ndarray, " examples"],
  reads: Int64[np.ndarray, " examples"],
  *,
  batch_size: int,
  shards: int = 1,
) -> Layout:
  """Chooses one length for a split: about `batch_size` examples per batch.

  It is the shortest with which the split needs no further batch, give or take
  what it is made longer by at once.

  Args:
    lengths: how many tokens every example has.
    reads: how many of them are learned.
    batch_size: about how many examples a batch has.
    shards: how many rows a batch has: one for each device along "data".
  """
  rows = max(1, round(len(lengths) / batch_size)) * shards
  # No row can be shorter than the longest text, nor than an equal share of all;
  # for learned tokens the same holds.
  length, room = (
    int(round_up(max(counts.max(), -(-counts.sum() // rows)), multiple))
    for counts, multiple in ((lengths, _MULTIPLE), (reads, _READS))
  )
  # Texts rarely fill rows to the end, so rows get longer until all have room,
  # with room for learned tokens in proportion.
  more = int(round_up(-(-_MULTIPLE * room // length), _READS))
  while True:
    layout = Layout((shards,), length, len(lengths), min(room, length))
    placement = place_all(lengths, layout, reads=reads)
    if placement.rows <= rows:
      return layout._replace(slots=int(np.bincount(placement.row).max()))
    length, room = length + _MULTIPLE, room + more


def _choose_lengths(needed: np.ndarray, *, compiling: float) -> list[int]:
  """The lengths that cost least, in tokens of a microbatch, ascending.

  Shortest paths: `best[i]` is the least cost of the microbatches that need at
  most the i-th length, if that is one of those chosen.

  Args:
    needed: the tokens that each microbatch of a sample needs per row.
    compiling: what each length costs, in tokens of a microbatch.
  """
  # Each microbatch is processed at the shortest chosen length that holds it. So
  # those that need more than length j and at most length i cost length i each,
  # where j and i are chosen one after the other; and choosing i costs a
  # compilation.
  values, times = np.unique(needed, return_counts=True)
  share = np.cumsum(times / len(needed))
  best: list[float] = []
  before: list[int] = []
  for i, length in enumerate(values.tolist()):
    starts = [-1, *range(i)]
    costs = [
      (best[j] if j >= 0 else 0.0)
      + length * (share[i] - (share[j] if j >= 0 else 0.0))
      + compiling
      for j in starts
    ]
    least = int(np.argmin(costs))
    best.append(costs[least])
    before.append(starts[least])
  # Back along the cheapest path, from the longest, which any choice includes.
  chosen, i = [], len(values) - 1
  while i >= 0:
    chosen.append(int(values[i]))
    i = before[i]
  return chosen[::-1]
