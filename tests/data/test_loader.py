import itertools
import threading

import numpy as np
import pytest

from vera_jax.data.loader import (
  batch_indices,
  epoch_order,
  eval_batches,
  member_batches,
  steps_per_epoch,
  train_batches,
)
from vera_jax.data.packing import plan_eval_layout, plan_layout
from vera_jax.data.portion import Portion
from vera_jax.data.prefetch import prefetch


@pytest.fixture
def tokens(make_tokens):
  return make_tokens(3, examples=45, longest=30)


@pytest.fixture
def layout(tokens):
  return plan_layout(tokens.lengths, batch_size=8)


def take(tokens, layout, count, **arguments):
  batches = train_batches(tokens, layout, batch_size=8, **arguments)
  try:
    return list(itertools.islice(batches, count))
  finally:
    batches.close()


def examples_of(*passes):
  every = np.concatenate([batch["example"].ravel() for batch in passes])
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
  two = take(tokens, layout, 2 * steps, seed=4)
  assert [step for step, _ in two] == list(range(12))
  for epoch in (two[:steps], two[steps:]):
    seen = [examples_of(*passes) for _, passes in epoch]
    assert [len(batch) for batch in seen] == [8] * 5 + [5]
    assert sorted(sum(seen, [])) == list(range(45))


@pytest.mark.parametrize("start", [1, 5, 6, 7, 13])
def test_a_step_has_the_same_batch_from_any_start(tokens, layout, start):
  whole = take(tokens, layout, 16, seed=2)
  part = take(tokens, layout, 3, seed=2, start_step=start)
  for (step, passes), (again, resumed) in zip(
    whole[start : start + 3], part, strict=True
  ):
    assert step == again
    for one, two in zip(passes, resumed, strict=True):
      for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], strict=True)
    indices = batch_indices(45, batch_size=8, seed=2, step=step)
    assert examples_of(*passes) == sorted(indices)


def test_members_have_their_own_batches_and_empty_rows(tokens, layout):
  seeds, empty = [2, 3, 5], 0
  stacked = member_batches(
    tokens, layout, batch_size=8, seeds=seeds, start_step=4
  )
  alone = [take(tokens, layout, 9, seed=s, start_step=4) for s in seeds]
  together = itertools.islice(stacked, 9)
  for (step, stacks), *own in zip(together, *alone, strict=True):
    assert {step} == {at for at, _ in own}
    every = itertools.zip_longest(*(passes for _, passes in own), fillvalue={})
    for stack, batches in zip(stacks, every, strict=True):
      counts = [len(batch.get("example", ())) for batch in batches]
      for place, (batch, used) in enumerate(zip(batches, counts, strict=True)):
        empty += max(counts) - used
        for name, array in batch.items():
          assert stack[name].shape[:2] == (3, max(counts))
          np.testing.assert_array_equal(stack[name][place, :used], array)
        assert (stack["example"][place, used:] == -1).all()
        for name in ("segment_ids", "weights"):
          assert not stack[name][place, used:].any()
  assert empty > 0  # some needed fewer rows than another
  stacked.close()


@pytest.mark.parametrize("shards", [1, 8])
def test_evaluation_sees_every_example_once_in_one_shape(make_tokens, shards):
  tokens = make_tokens(5, examples=5000, longest=30)
  layout = plan_eval_layout(tokens.lengths, batch_size=256, shards=shards)
  batches = list(eval_batches(tokens, layout))
  shapes = {batch["input_ids"].shape for batch in batches}
  assert shapes == {(layout.rows[0], layout.length)}
  assert sorted(sum(map(examples_of, batches), [])) == list(range(5000))
  for batch in batches:
    filled = batch["example"] >= 0
    labels = tokens.labels[batch["example"][filled]]
    np.testing.assert_array_equal(batch["labels"][filled], labels)


PORTIONS = [Portion(0, 3, 4), Portion(3, 4, 4)]  # of two processes


def assert_joined(parts, whole, axis=0):
  for name, array in whole.items():
    joined = np.concatenate([part[name] for part in parts], axis)
    np.testing.assert_array_equal(joined, array, strict=True)


def test_the_processes_portions_are_the_batch(tokens):
  layout = plan_layout(tokens.lengths, batch_size=8, shards=4)
  whole, *parts = (
    take(tokens, layout, 12, seed=2, **given)
    for given in ({}, *({"portion": portion} for portion in PORTIONS))
  )
  for (_, passes), *own in zip(whole, *parts, strict=True):
    for batch, *pieces in zip(passes, *(p for _, p in own), strict=True):
      assert_joined(pieces, batch)
      rows = [len(piece["labels"]) for piece in pieces]
      assert rows[0] == 3 * rows[1]
      assert [p.whole(n) for p, n in zip(PORTIONS, rows, strict=True)] == [
        len(batch["labels"])
      ] * 2


def test_so_are_those_of_members_and_of_evaluation(tokens):
  layout = plan_layout(tokens.lengths, batch_size=8, shards=4)
  members = [
    member_batches(tokens, layout, batch_size=8, seeds=[2, 3], **given)
    for given in ({}, *({"portion": portion} for portion in PORTIONS))
  ]
  for (_, passes), *own in itertools.islice(zip(*members, strict=True), 6):
    for batch, *pieces in zip(passes, *(p for _, p in own), strict=True):
      assert_joined(pieces, batch, axis=1)
  for batches in members:
    batches.close()
  layout = plan_eval_layout(tokens.lengths, batch_size=16, shards=4)
  parts = [eval_batches(tokens, layout, portion=p) for p in PORTIONS]
  whole = eval_batches(tokens, layout)
  for batch, *pieces in zip(whole, *parts, strict=True):
    assert_joined(pieces, batch)


def workers():
  return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_closing_ends_the_thread(tokens, layout):
  batches = train_batches(tokens, layout, batch_size=8, seed=0)
  next(batches)
  assert len(workers()) == 1
  batches.close()
  assert not workers()


def test_prefetch_keeps_the_order_and_ends():
  assert list(prefetch(range(50), 3)) == list(range(50))
  assert not workers()


def test_prefetch_runs_only_so_far_ahead():
  made = []
  items = prefetch((made.append(i) or i for i in range(100)), 2)
  next(items)
  items.close()
  assert len(made) <= 5


def test_prefetch_hands_on_an_error_after_the_items_before_it():
  def broken():
    yield 1
    raise KeyError("lost")

  items = prefetch(broken(), 4)
  assert next(items) == 1
  with pytest.raises(KeyError, match="lost"):
    next(items)
  assert not workers()
