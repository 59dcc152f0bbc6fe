"""Long rows: any batch fits, little is padded, runs have the same shapes."""

from itertools import combinations

import numpy as np
import pytest

from vera_jax.data.loader import batch_indices, eval_batches
from vera_jax.data.long_rows import (
  _choose_lengths,
  choose_long_eval_rows,
  choose_long_rows,
)
from vera_jax.data.packing import Layout, pack_runs, spread
from vera_jax.data.tokens import Tokens
from vera_jax.errors import UserError


@pytest.fixture(scope="module")
def tokens():
  """As E2E: some fifty tokens, of which about a half are learned."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(30, 90, 300)
  offsets = np.cumsum([0, *lengths])
  learned = np.zeros(offsets[-1], bool)
  for start, n in zip(offsets[:-1], lengths, strict=True):
    learned[start + int(n * rng.uniform(0.3, 0.7)) : start + n] = True
  ids = rng.integers(3, 50, offsets[-1]).astype(np.int32)
  return Tokens(
    ids=ids,
    offsets=offsets,
    token_types=np.zeros_like(ids),
    labels=None,
    index=np.arange(300),
    learned=learned,
    pad_id=0,
    truncated=0,
    fingerprint="",
  )


def packed(tokens, layout, *, size, seeds, steps=37):
  for step in range(steps):
    batches = [
      batch_indices(len(tokens), batch_size=size, seed=s, step=step)
      for s in seeds
    ]
    yield batches, pack_runs(tokens, batches, layout)


@pytest.mark.parametrize(
  "settings",
  [
    {"batch_size": 8},
    {"batch_size": 8, "epochs": 100},
    {"batch_size": 8, "microbatch_rows": 2},
    {"batch_size": 24, "shards": 4},
    {"batch_size": 1},
  ],
  ids=str,
)
def test_any_batch_fits_and_little_is_padded(tokens, settings):
  layout = choose_long_rows(tokens.lengths, tokens.reads, **settings)
  shapes = {(s.rows[0], s.length, s.reads) for s in layout.shapes}
  real = processed = 0
  for (batch,), (microbatches,) in packed(
    tokens, layout, size=settings["batch_size"], seeds=[1]
  ):
    seen = np.concatenate([b["example"].ravel() for b in microbatches])
    assert sorted(seen[seen >= 0]) == sorted(batch)
    weights = sum(b["weights"].sum() for b in microbatches)
    assert weights == tokens.reads[batch].sum()
    for b in microbatches:
      assert (*b["input_ids"].shape, b["weights"].shape[1]) in shapes
      real += (b["segment_ids"] > 0).sum()
      processed += b["segment_ids"].size
  assert real / processed > (0.9 if settings == {"batch_size": 8} else 0.7)
  most = settings.get("microbatch_rows")
  assert most is None or layout.length <= most * 96


@pytest.mark.parametrize("shards", [1, 4])
def test_an_evaluation_sees_each_example_once_in_full_rows(tokens, shards):
  layout = choose_long_eval_rows(
    tokens.lengths, tokens.reads, batch_size=32, shards=shards
  )
  batches = list(eval_batches(tokens, layout))
  assert len(batches) == 9  # of 300 / 32 examples each
  seen = np.concatenate([batch["example"].ravel() for batch in batches])
  assert sorted(seen[seen >= 0]) == list(range(300))
  for name, multiple, full in (("segment_ids", 32, 0.9), ("weights", 8, 0.85)):
    filled = [batch[name] > 0 for batch in batches]
    assert filled[0].shape[0] == shards and filled[0].shape[1] % multiple == 0
    assert np.mean(filled) > full


def test_runs_of_an_ensemble_have_the_same_shapes(tokens):
  layout = choose_long_rows(tokens.lengths, tokens.reads, batch_size=8)
  length, reads = layout.sizes[0]
  layout = layout._replace(length=length, reads=reads, sizes=layout.sizes[:1])
  several = 0
  for batches, runs in packed(tokens, layout, size=8, seeds=[1, 2], steps=9):
    several += len(runs[0]) > 1
    for one, other in zip(*runs, strict=True):
      for name, array in one.items():
        assert array.shape == other[name].shape
    for batch, run in zip(batches, runs, strict=True):
      learned = sum(b["weights"].sum() for b in run)
      assert learned == tokens.reads[batch].sum()
  assert several  # the shortest rows alone are too few for some batches


def test_the_lengths_are_the_best_ones():
  """Against all sets of them."""
  needed = np.random.default_rng(2).choice([32, 64, 96, 160, 192], 60)
  for compiling in (0.0, 5.0, 200.0):

    def cost(lengths, compiling=compiling):
      used = [min(x for x in lengths if x >= n) for n in needed]
      return np.mean(used) + compiling * len(lengths)

    others = (32, 64, 96, 160)
    sets = [{192, *x} for n in range(5) for x in combinations(others, n)]
    chosen = _choose_lengths(needed, compiling=compiling)
    assert cost(chosen) == pytest.approx(min(map(cost, sets)))


def test_what_is_refused(tokens):
  with pytest.raises(UserError, match="microbatch_rows is 3.* 4 batch shards"):
    choose_long_rows(
      tokens.lengths, tokens.reads, batch_size=8, shards=4, microbatch_rows=3
    )
  layout = Layout((1,), 32, 8, 32, sizes=((32, 32),))
  with pytest.raises(ValueError, match="40 tokens exceed 32"):
    spread(np.array([40]), layout, reads=np.array([1]))
