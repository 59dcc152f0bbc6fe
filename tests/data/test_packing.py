"""What packing must keep, over random batches and layouts."""

import dataclasses

import numpy as np
import pytest

from vera_jax.data.packing import (
  Layout,
  first_fit,
  microbatch_cost,
  pack_runs,
  rows_of_microbatches,
)


@pytest.mark.parametrize("seed", range(6))
def test_every_example_once_and_whole_in_the_layouts_shapes(make_tokens, seed):
  rng = np.random.default_rng(seed)
  tokens = make_tokens(seed, examples=80, longest=40)
  indices = rng.permutation(80)[: rng.integers(1, 33)]
  # few rows, so that many batches take several microbatches
  length = int(tokens.lengths.max() + rng.integers(0, 40))
  layout = Layout((4, 11), length, int(rng.integers(1, 12)))
  needed = first_fit(tokens.lengths[indices], layout).rows
  shapes = rows_of_microbatches(needed, layout)
  found, filled = [], 0
  for batch, rows in zip(
    pack_runs(tokens, [indices], layout)[0], shapes, strict=True
  ):
    for name, array in batch.items():
      wide = name in ("input_ids", "token_type_ids", "positions", "segment_ids")
      assert array.shape == (rows, layout.length if wide else layout.slots)
      assert array.dtype == (np.float32 if name == "weights" else np.int32)
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
    real = batch["segment_ids"] > 0
    filled += real.sum()
    assert (batch["input_ids"][~real] == tokens.pad_id).all()
    np.testing.assert_array_equal(batch["weights"], batch["example"] >= 0)
  assert sorted(found) == sorted(indices)
  assert filled == tokens.lengths[indices].sum()


@pytest.mark.parametrize("rows", [(3,), (1, 6), (2, 5, 7)])
def test_microbatches_have_the_rows_needed(rows):
  layout = Layout(rows, 72, 9)
  for needed in range(1, 40):
    shapes = rows_of_microbatches(needed, layout)
    assert set(shapes) <= set(rows) and set(shapes[1:]) <= {rows[0]}
    assert sum(shapes) >= needed > sum(shapes[:-1])
    least = microbatch_cost(needed, np.array(rows), rows[0], 72).min()
    assert least == 72 * sum(shapes) + 32 * (len(shapes) - 1)


def test_a_batch_by_hand(make_tokens):
  tokens = make_tokens(0, examples=3, longest=5)
  tokens.offsets[:] = [0, 5, 8, 11]
  indices = np.array([1, 0, 2])
  (batch,) = pack_runs(tokens, [indices], Layout((2, 3), 8, 2))[0]
  # the longest first, then the others where there is room, in order
  assert batch["example"].tolist() == [[0, 1], [2, -1]]
  assert batch["segment_ids"].tolist() == [
    [1, 1, 1, 1, 1, 2, 2, 2],
    [1, 1, 1, 0, 0, 0, 0, 0],
  ]
  assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
  assert batch["cls_positions"].tolist() == [[0, 5], [0, 0]]
  two = pack_runs(tokens, [indices], Layout((1,), 8, 2))[0]
  for name, array in batch.items():
    np.testing.assert_array_equal(np.concatenate([b[name] for b in two]), array)


@pytest.mark.parametrize("choices", [2, 5])
def test_an_examples_choices_lie_in_one_row_in_order(make_tokens, choices):
  texts = make_tokens(3, examples=20 * choices, longest=9)
  tokens = dataclasses.replace(
    texts, choices=choices, labels=texts.labels[:20], index=np.arange(20)
  )
  layout = Layout((3, 5), int(tokens.lengths.max()) + 10, 3)
  found = []
  (batches,) = pack_runs(tokens, [np.arange(4, 20)], layout)
  for batch in batches:
    rows = len(batch["example"])
    assert batch["cls_positions"].shape == (rows, 3 * choices)
    starts = batch["cls_positions"].reshape(rows, 3, choices)
    for row, slot in np.argwhere(batch["example"] >= 0):
      i = batch["example"][row, slot]
      for choice in range(choices):
        number = slot * choices + choice
        columns = np.flatnonzero(batch["segment_ids"][row] == number + 1)
        length = tokens.text_lengths[i * choices + choice]
        expected = starts[row, slot, choice] + np.arange(length)
        np.testing.assert_array_equal(columns, expected)
        positions = batch["positions"][row, columns]
        np.testing.assert_array_equal(positions, np.arange(length))
        source = tokens.offsets[i * choices + choice] + np.arange(length)
        got = batch["input_ids"][row, columns]
        np.testing.assert_array_equal(got, tokens.ids[source])
      assert batch["labels"][row, slot] == tokens.labels[i]
      found.append(i)
  assert sorted(found) == list(range(4, 20))


def test_regression_labels_and_none(make_tokens):
  tokens = make_tokens(0, examples=4, longest=6, regression=True)
  layout = Layout((4,), 8, 2)
  (batch,) = pack_runs(tokens, [np.arange(4)], layout)[0]
  assert batch["labels"].dtype == np.float32
  unlabelled = dataclasses.replace(tokens, labels=None)
  (batch,) = pack_runs(unlabelled, [np.arange(4)], layout)[0]
  assert not batch["labels"].any()


def test_what_does_not_fit_is_an_error(make_tokens):
  tokens = make_tokens(0, examples=8, longest=20)
  with pytest.raises(ValueError, match="20 tokens exceed 16"):
    pack_runs(tokens, [np.arange(8)], Layout((8,), 16, 4))[0]


@pytest.mark.parametrize("seed", range(2))
def test_each_learned_token_is_read_one_column_before(make_tokens, seed):
  rng = np.random.default_rng(seed)
  tokens = make_tokens(seed, examples=40, longest=20)
  learned = rng.random(len(tokens.ids)) < 0.5
  learned[tokens.offsets[:-1]] = False  # nothing comes before them
  tokens = dataclasses.replace(tokens, learned=learned)
  indices = rng.permutation(40)[:20]
  layout = Layout((3, 5), 24, 6, reads=int(tokens.reads.max()) + 2)
  found = []
  for batch in pack_runs(tokens, [indices], layout)[0]:
    rows = len(batch["input_ids"])
    for name in ("read_positions", "labels", "weights"):
      assert batch[name].shape == (rows, layout.reads)
    real = batch["weights"] > 0
    # the empty ones are at the end and say nothing
    assert (np.diff(batch["weights"]) <= 0).all()
    assert not batch["labels"][~real].any()
    assert not batch["read_positions"][~real].any()
    for row, read in np.argwhere(real):
      column = batch["read_positions"][row, read]
      segment = batch["segment_ids"][row]
      assert segment[column] == segment[column + 1] > 0
      label = batch["labels"][row, read]
      assert label == batch["input_ids"][row, column + 1]
      example = batch["example"][row, segment[column] - 1]
      within = batch["positions"][row, column + 1]
      found.append(tokens.offsets[example] + within)
  wanted = [
    place
    for i in indices
    for place in range(tokens.offsets[i], tokens.offsets[i + 1])
    if learned[place]
  ]
  assert sorted(found) == sorted(wanted)


def test_a_row_has_room_for_so_many_learned_tokens():
  lengths, reads = np.array([4, 4, 4]), np.array([3, 1, 1])
  layout = Layout((2,), 12, 3, reads=4)
  place = first_fit(lengths, layout, reads=reads)
  assert place.row.tolist() == [0, 0, 1] and place.rows == 2
  assert first_fit(lengths, layout).rows == 1
  with pytest.raises(ValueError, match="3 learned tokens exceed 2 a row"):
    first_fit(lengths, layout._replace(reads=2), reads=reads)
