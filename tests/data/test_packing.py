"""What packing must keep, over random batches and layouts."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from vera_jax.data.glue import TASKS, load_split, subset
from vera_jax.data.packing import Layout, pack, plan_eval_layout, plan_layout
from vera_jax.data.placement import first_fit
from vera_jax.data.plan import _row_counts
from vera_jax.data.tokens import load_tokenizer, tokenise


def random_layout(rng, tokens, batch: int) -> Layout:
  length = int(tokens.lengths.max() + rng.integers(0, 40))
  return Layout((batch // 3, batch), length, int(rng.integers(1, 12)))


@pytest.mark.parametrize("seed", range(20))
def test_every_example_once_and_whole(make_tokens, seed):
  rng = np.random.default_rng(seed)
  tokens = make_tokens(seed, examples=80, longest=40)
  indices = rng.permutation(80)[: rng.integers(1, 33)]
  layout = random_layout(rng, tokens, 33)
  batch = pack(tokens, indices, layout)
  found = []
  for row, slot in np.argwhere(batch["example"] >= 0):
    i = batch["example"][row, slot]
    start = batch["cls_positions"][row, slot]
    columns = np.flatnonzero(batch["segment_ids"][row] == slot + 1)
    length = tokens.lengths[i]
    # consecutive columns of its own segment, positions from 0
    np.testing.assert_array_equal(columns, start + np.arange(length))
    positions = batch["positions"][row, columns]
    np.testing.assert_array_equal(positions, np.arange(length))
    source = slice(tokens.offsets[i], tokens.offsets[i + 1])
    for name, values in (
      ("input_ids", tokens.ids),
      ("token_type_ids", tokens.token_types),
    ):
      got = batch[name][row, columns]
      np.testing.assert_array_equal(got, values[source])
    assert batch["labels"][row, slot] == tokens.labels[i]
    found.append(i)
  assert sorted(found) == sorted(indices)
  real = batch["segment_ids"] > 0
  assert real.sum() == tokens.lengths[indices].sum()
  assert (batch["input_ids"][~real] == tokens.pad_id).all()


@pytest.mark.parametrize("seed", range(10))
def test_shapes_are_the_layouts(make_tokens, seed):
  rng = np.random.default_rng(seed)
  tokens = make_tokens(seed, examples=80, longest=40)
  layout = random_layout(rng, tokens, 24)
  indices = rng.permutation(80)[:24]
  batch = pack(tokens, indices, layout)
  rows = batch["input_ids"].shape[0]
  needed = first_fit(tokens.lengths[indices], layout).rows
  assert rows == min(r for r in layout.rows if r >= needed)
  wide = ("input_ids", "token_type_ids", "positions", "segment_ids")
  for name in wide:
    assert batch[name].shape == (rows, layout.length)
  for name in ("cls_positions", "example", "labels"):
    assert batch[name].shape == (rows, layout.slots)
  assert all(array.dtype == np.int32 for array in batch.values())
  again = pack(tokens, indices, layout)
  for name, array in batch.items():
    np.testing.assert_array_equal(array, again[name])


def test_a_batch_by_hand(make_tokens):
  tokens = make_tokens(0, examples=3, longest=5)
  tokens.offsets[:] = [0, 5, 8, 11]
  batch = pack(tokens, np.array([1, 0, 2]), Layout((2, 3), 8, 2))
  # the longest first, then the others where there is room, in order
  assert batch["example"].tolist() == [[0, 1], [2, -1]]
  assert batch["segment_ids"].tolist() == [
    [1, 1, 1, 1, 1, 2, 2, 2],
    [1, 1, 1, 0, 0, 0, 0, 0],
  ]
  assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
  assert batch["cls_positions"].tolist() == [[0, 5], [0, 0]]


def test_regression_labels_and_none(make_tokens):
  tokens = make_tokens(0, examples=4, longest=6, regression=True)
  layout = Layout((4,), 8, 2)
  assert pack(tokens, np.arange(4), layout)["labels"].dtype == np.float32
  unlabelled = dataclasses.replace(tokens, labels=None)
  assert not pack(unlabelled, np.arange(4), layout)["labels"].any()


def test_what_does_not_fit_is_an_error(make_tokens):
  tokens = make_tokens(0, examples=8, longest=20)
  with pytest.raises(ValueError, match="20 tokens exceed 16"):
    pack(tokens, np.arange(8), Layout((8,), 16, 4))
  with pytest.raises(ValueError, match="rows are needed"):
    pack(tokens, np.arange(8), Layout((1,), 24, 4))


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [5, 32])
def test_a_plan_fits_every_batch(make_tokens, batch_size, shards):
  tokens = make_tokens(1, examples=200, longest=90)
  lengths = tokens.lengths
  layout = plan_layout(lengths, batch_size=batch_size, shards=shards)
  assert layout == plan_layout(lengths, batch_size=batch_size, shards=shards)
  assert layout.length % 8 == 0 and layout.length >= 90
  assert all(rows % shards == 0 for rows in layout.rows)
  assert list(layout.rows) == sorted(set(layout.rows))
  assert len(layout.rows) <= 5
  longest = np.argsort(-lengths)[:batch_size]
  shortest = np.argsort(lengths)[:batch_size]
  for worst in (longest, shortest, np.array([0])):
    pack(tokens, worst, layout)
  usual = layout.rows[0]
  assert usual <= batch_size or usual == shards


def test_a_batch_larger_than_the_data(make_tokens):
  tokens = make_tokens(1, examples=3, longest=9)
  layout = plan_layout(tokens.lengths, batch_size=64)
  assert layout.rows[-1] <= 3 and layout.length <= 2 * 16
  pack(tokens, np.arange(3), layout)


def test_row_counts_are_the_best_by_brute_force():
  rng = np.random.default_rng(0)
  needed = np.round(rng.normal(12, 2, 300)).astype(np.int64)
  values = np.unique(needed)
  for count in (1, 2, 3, 4):

    def total(rows):
      return sum(min(r for r in rows if r >= n) for n in needed.tolist())

    every = combinations(values[:-1].tolist(), count - 1)
    best = min(total((*rows, int(values[-1]))) for rows in every)
    chosen = _row_counts(needed, count)
    assert total(chosen) == best and len(chosen) == count


@pytest.mark.parametrize("name", ["cola", "rte", "sst2"])
def test_at_most_a_tenth_of_real_batches_is_padding(
  glue_folder, minilm_folder, name
):
  some = subset(load_split(TASKS[name], glue_folder, "train"), 2000, 0)
  tokenizer = load_tokenizer(minilm_folder)
  for max_length in (128, 512):
    tokens = tokenise(some, tokenizer, max_length, None)
    for batch_size in (32, 64):
      layout = plan_layout(tokens.lengths, batch_size=batch_size)
      assert padding(tokens, layout, batch_size) <= 0.1


def padding(tokens, layout, batch_size) -> float:
  """The share of padding in the tokens of two epochs' whole batches."""
  rng = np.random.default_rng(9)
  counts = []
  for order in (rng.permutation(len(tokens)) for _ in range(2)):
    for start in range(0, len(order) - batch_size, batch_size):
      batch = pack(tokens, order[start : start + batch_size], layout)
      empty = (batch["segment_ids"] == 0).sum()
      counts.append((empty, batch["segment_ids"].size))
  return np.divide(*np.sum(counts, axis=0))


def test_an_evaluation_plan_is_one_shape(make_tokens):
  tokens = make_tokens(1, examples=300, longest=50)
  layout = plan_eval_layout(tokens.lengths, batch_size=64, shards=4)
  assert len(layout.rows) == 1 and layout.rows[0] % 4 == 0
  assert layout.length == 56
