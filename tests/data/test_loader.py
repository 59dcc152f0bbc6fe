import itertools
import threading
from unittest.mock import Mock

import numpy as np
import pytest

from vera_jax.data import loader
from vera_jax.data.layout import choose_eval_layout, choose_layout
from vera_jax.data.loader import (
  batch_indices,
  epoch_order,
  eval_batches,
  sample_batch,
  steps_per_epoch,
  train_batches,
)
from vera_jax.data.packing import ProcessShard, pack_runs


@pytest.fixture
def tokens(make_tokens):
  return make_tokens(3, examples=45, longest=30)


@pytest.fixture
def layout(tokens):
  return choose_layout(tokens.lengths, batch_size=8)


def take(tokens, layout, count, **arguments):
  batches = train_batches(tokens, layout, batch_size=8, **arguments)
  try:
    return list(itertools.islice(batches, count))
  finally:
    batches.close()


def examples_of(*microbatches):
  every = np.concatenate([batch["example"].ravel() for batch in microbatches])
  return sorted(every[every >= 0].tolist())


def test_orders_depend_on_seed_and_epoch():
  orders = [
    epoch_order(50, seed=seed, epoch=epoch).tolist()
    for seed in (0, 1)
    for epoch in (0, 1)
  ]
  assert all(sorted(order) == list(range(50)) for order in orders)
  assert len({tuple(order) for order in orders}) == 4
  assert orders[1] == epoch_order(50, seed=0, epoch=1).tolist()


def test_an_epoch_holds_every_example_once(tokens, layout):
  steps = steps_per_epoch(45, 8)
  assert steps == 6  # the last has five examples
  two = take(tokens, layout, 2 * steps, seeds=4)
  assert [step for step, _ in two] == list(range(12))
  for epoch in (two[:steps], two[steps:]):
    seen = [examples_of(*batches) for _, batches in epoch]
    assert [len(batch) for batch in seen] == [8] * 5 + [5]
    assert sorted(sum(seen, [])) == list(range(45))


@pytest.mark.parametrize("start", [1, 5, 6, 7, 13])
def test_a_step_has_the_same_batch_from_any_start(tokens, layout, start):
  whole = take(tokens, layout, 16, seeds=2)
  part = take(tokens, layout, 3, seeds=2, start_step=start)
  for (step, batches), (again, resumed) in zip(
    whole[start : start + 3], part, strict=True
  ):
    assert step == again
    for one, two in zip(batches, resumed, strict=True):
      for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], strict=True)
    indices = batch_indices(45, batch_size=8, seed=2, step=step)
    assert examples_of(*batches) == sorted(indices)


def test_each_run_of_an_ensemble_has_its_own_batches(tokens, layout):
  """Whose steps may be of different epochs, of six steps each."""
  seeds, starts, empty = [2, 3, 5], [10, 4, 16], 0
  alone = [
    take(tokens, layout, 9, seeds=seed, start_step=start)
    for seed, start in zip(seeds, starts, strict=True)
  ]
  together = take(tokens, layout, 9, seeds=seeds, start_step=starts)
  for (step, stacks), *own in zip(together, *alone, strict=True):
    assert step == own[0][0]
    every = itertools.zip_longest(*(each for _, each in own), fillvalue={})
    for stack, batches in zip(stacks, every, strict=True):
      counts = [len(batch.get("example", ())) for batch in batches]
      for run, (batch, used) in enumerate(zip(batches, counts, strict=True)):
        empty += max(counts) - used
        for name, array in batch.items():
          assert stack[name].shape[:2] == (3, max(counts))
          np.testing.assert_array_equal(stack[name][run, :used], array)
        assert (stack["example"][run, used:] == -1).all()
        for name in ("segment_ids", "weights"):
          assert not stack[name][run, used:].any()
  assert empty > 0  # some needed fewer rows than another


@pytest.mark.parametrize("shards", [1, 8])
def test_evaluation_sees_every_example_once_in_one_shape(make_tokens, shards):
  tokens = make_tokens(5, examples=5000, longest=30)
  layout = choose_eval_layout(tokens.lengths, batch_size=256, shards=shards)
  batches = list(eval_batches(tokens, layout))
  shapes = {batch["input_ids"].shape for batch in batches}
  assert shapes == {(layout.rows[0], layout.length)}
  assert sorted(sum(map(examples_of, batches), [])) == list(range(5000))
  for batch in batches:
    filled = batch["example"] >= 0
    labels = tokens.labels[batch["example"][filled]]
    np.testing.assert_array_equal(batch["labels"][filled], labels)


SHARDS = [ProcessShard(0, 3, 4), ProcessShard(3, 4, 4)]  # of two processes


def assert_joined(parts, whole, axis=0):
  for name, array in whole.items():
    joined = np.concatenate([part[name] for part in parts], axis)
    np.testing.assert_array_equal(joined, array, strict=True)


@pytest.mark.parametrize("seeds, axis", [(2, 0), ([2, 3], 1)])
def test_the_shards_of_all_processes_are_the_batch(tokens, seeds, axis):
  layout = choose_layout(tokens.lengths, batch_size=8, shards=4)
  whole = take(tokens, layout, 12, seeds=seeds)
  parts = [take(tokens, layout, 12, seeds=seeds, shard=s) for s in SHARDS]
  for (_, batches), *own in zip(whole, *parts, strict=True):
    for batch, *pieces in zip(batches, *(p for _, p in own), strict=True):
      assert_joined(pieces, batch, axis)
      rows = [piece["labels"].shape[axis] for piece in pieces]
      assert rows[0] == 3 * rows[1]
      for shard, count in zip(SHARDS, rows, strict=True):
        assert shard.global_rows(count) == batch["labels"].shape[axis]


def test_so_are_those_of_evaluation(tokens):
  layout = choose_eval_layout(tokens.lengths, batch_size=16, shards=4)
  parts = [eval_batches(tokens, layout, shard=s) for s in SHARDS]
  whole = eval_batches(tokens, layout)
  for batch, *pieces in zip(whole, *parts, strict=True):
    assert_joined(pieces, batch)


@pytest.mark.parametrize("seeds, runs", [(1, None), ([1, 2], 2)])
def test_a_sample_has_the_shapes_of_training(tokens, layout, seeds, runs):
  [(_, (batch, *_))] = take(tokens, layout, 1, seeds=seeds)
  rows = batch["labels"].shape[-2]
  sample = sample_batch(tokens, layout._replace(rows=(rows,)), runs=runs)
  for name, array in batch.items():
    assert sample[name].shape == array.shape
    assert sample[name].dtype == array.dtype


def workers():
  return [t for t in threading.enumerate() if t.name.startswith("pack batches")]


def test_closing_ends_the_thread(tokens, layout):
  batches = train_batches(tokens, layout, batch_size=8, seeds=0)
  next(batches)
  assert len(workers()) == 1
  batches.close()
  assert not workers()


def test_batches_are_packed_only_so_far_ahead(tokens, layout, monkeypatch):
  packing = Mock(wraps=pack_runs)
  monkeypatch.setattr(loader, "pack_runs", packing)
  take(tokens, layout, 1, seeds=0)
  assert 1 <= packing.call_count <= 5


def test_an_error_comes_after_the_batches_before_it(
  tokens, layout, monkeypatch
):
  good = pack_runs(tokens, [np.arange(8)], layout)
  packing = Mock(side_effect=[good, KeyError("lost")])
  monkeypatch.setattr(loader, "pack_runs", packing)
  batches = train_batches(tokens, layout, batch_size=8, seeds=0)
  assert next(batches)[0] == 0
  with pytest.raises(KeyError, match="lost"):
    next(batches)
  assert not workers()
