"""Row lengths and counts: any batch fits, and little is padding."""

import json
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest

from vera_jax.data.layout import (
  _choose_row_counts,
  choose_eval_layout,
  choose_layout,
  limit_rows,
)
from vera_jax.data.loader import batch_indices, steps_per_epoch
from vera_jax.data.packing import (
  Layout,
  first_fit,
  microbatch_cost,
  pack_runs,
  place_all,
  rows_of_microbatches,
)
from vera_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden/lengths.json"
COUNTS = json.loads(GOLDEN.read_text())  # by tests/golden/make_lengths.py
# By batch size: the paper's max_length, RoBERTa-base (64) and -large (32).
LONGEST = {64: 512, 32: 128}
# Epochs by batch size: Table 8's, and those of configs/minilm.py.
PAPER = {
  "sst2": {64: 60, 32: 10},
  "cola": {64: 80, 32: 40},
  "rte": {64: 160, 32: 40},
}
SHORT = {"sst2": 3, "cola": 6, "rte": 5}
RUNS = [
  (task, tokenizer, size, some, epochs)
  for task in PAPER
  for tokenizer in ("roberta", "minilm")
  for size in LONGEST
  for some, epochs in (
    (None, PAPER[task][size]),
    (4000 if task == "sst2" else None, SHORT[task]),
  )
]


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [5, 32])
def test_any_batch_fits(make_tokens, batch_size, shards):
  tokens = make_tokens(1, examples=200, longest=90)
  lengths = tokens.lengths
  settings = {"batch_size": batch_size, "shards": shards, "epochs": 1000}
  layout = choose_layout(lengths, **settings)
  assert layout == choose_layout(lengths, **settings)
  assert layout.length % 8 == 0 and layout.length >= 90
  assert all(rows % shards == 0 for rows in layout.rows)
  assert list(layout.rows) == sorted(set(layout.rows))
  assert 1 <= len(layout.rows) <= 3
  longest = np.argsort(-lengths)[:batch_size]
  shortest = np.argsort(lengths)[:batch_size]
  for worst in (longest, shortest, np.array([0])):
    shapes = {
      b["input_ids"].shape for b in pack_runs(tokens, [worst], layout)[0]
    }
    assert shapes <= {(rows, layout.length) for rows in layout.rows}


def test_a_short_run_has_one_shape_and_a_long_one_three(make_tokens):
  lengths = make_tokens(1, examples=500, longest=60).lengths
  counts = [
    len(choose_layout(lengths, batch_size=32, epochs=epochs).rows)
    for epochs in (1, 10, 1000)
  ]
  assert counts[0] == 1 and counts == sorted(counts) and counts[-1] == 3


def test_row_counts_are_the_best_by_brute_force():
  rng = np.random.default_rng(0)
  needed = np.round(rng.normal(12, 2, 100)).astype(np.int64)
  for compiling in (0.0, 20.0, 1e6):

    def mean(rows, compiling=compiling):
      rows = tuple(sorted(set(rows)))
      costs = [microbatch_cost(needed, main, rows[0], 72) for main in rows]
      return np.min(costs, axis=0).mean() + compiling * len(rows)

    every = combinations_with_replacement({1, 2, 3, 4, *needed.tolist()}, 3)
    cost, rows = _choose_row_counts(needed, 72, shards=1, compiling=compiling)
    assert cost == pytest.approx(mean(rows))
    assert cost == pytest.approx(min(map(mean, every)))
  assert len(rows) == 1


def test_an_evaluation_has_one_shape(make_tokens):
  tokens = make_tokens(1, examples=300, longest=50)
  layout = choose_eval_layout(tokens.lengths, batch_size=64, shards=4)
  assert len(layout.rows) == 1 and layout.rows[0] % 4 == 0
  assert layout.length == 56


def lengths_of(task: str, tokenizer: str, size: int, split: str):
  """Real lengths, shuffled; GLUE's files are not needed."""
  counts = COUNTS[f"{task} {tokenizer} {LONGEST[size]} {split}"]
  lengths = np.repeat(np.arange(len(counts)), counts)
  return np.random.default_rng(0).permutation(lengths)


def padding(lengths, layout: Layout, *, size: int, epochs: int) -> float:
  """The share of padding in a run's tokens, over its first steps."""
  steps = min(epochs * steps_per_epoch(len(lengths), size), 400)
  real = rows = 0
  for step in range(steps):
    batch = batch_indices(len(lengths), batch_size=size, seed=3, step=step)
    real += lengths[batch].sum()
    rows += sum(
      rows_of_microbatches(first_fit(lengths[batch], layout).rows, layout)
    )
  return 1 - real / (rows * layout.length)


@pytest.mark.parametrize("task, tokenizer, size, some, epochs", RUNS)
def test_at_most_a_tenth_is_padding(task, tokenizer, size, some, epochs):
  """With -s, the table of padding and shapes."""
  lengths = lengths_of(task, tokenizer, size, "train")[:some]
  layout = choose_layout(lengths, batch_size=size, epochs=epochs)
  share = padding(lengths, layout, size=size, epochs=epochs)
  print(
    f"\n{task:5}{tokenizer:8} {len(lengths):6} examples, batch {size},"
    f" {epochs:3} epochs: {share:5.1%} padding,"
    f" {layout.rows} rows of {layout.length}"
  )
  assert share <= 0.1 and len(layout.rows) <= 3


@pytest.mark.parametrize("tokenizer", ["roberta", "minilm"])
@pytest.mark.parametrize("task", PAPER)
def test_at_most_a_tenth_of_an_evaluation_is_padding(task, tokenizer):
  for size in LONGEST:
    for split in ("validation", "test"):
      lengths = lengths_of(task, tokenizer, size, split)
      layout = choose_eval_layout(lengths, batch_size=128)
      (rows,) = layout.rows
      batches = -(-place_all(lengths, layout).rows // rows)
      share = 1 - lengths.sum() / (batches * rows * layout.length)
      print(
        f"\n{task:5}{tokenizer:8} {split}: {share:5.1%} padding,"
        f" {batches} batches of {rows} rows of {layout.length}"
      )
      assert share <= 0.1


def test_a_microbatch_may_be_smaller_than_the_batch():
  layout = Layout((4, 16, 24), 64, 3)
  assert limit_rows(layout, 13, shards=4).rows == (4, 12)
  assert limit_rows(layout, 4, shards=4).rows == (4,)
  assert limit_rows(layout, 99) == layout
  assert sum(rows_of_microbatches(24, limit_rows(layout, 12))) >= 24
  with pytest.raises(UserError, match="microbatch_rows is 3.* 4 batch shards"):
    limit_rows(layout, 3, shards=4)
