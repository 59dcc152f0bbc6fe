"""Batches of images: functions of (seed, step), each image once per epoch."""

import itertools

import numpy as np
import pytest

from vera_jax.data.image_batches import ImageData
from vera_jax.data.images import Prepared, Processor
from vera_jax.data.packing import ProcessShard

PLAIN = Processor(0, 6, 5, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)


def split(count):
  rng = np.random.default_rng(count)
  pixels = rng.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
  labels = rng.integers(0, 3, count).astype(np.int32)
  return Prepared(pixels, labels, [""] * count, [], "")


def data(**options):
  splits = {"train": split(11), "dev": split(7)}
  shapes = dict(rows=2, eval_rows=4, batch_size=4)
  return ImageData(splits, PLAIN, **{**shapes, **options})


def steps(given, count, **options):
  return list(itertools.islice(given.train_batches(**options), count))


def equal(one, two):
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_an_epoch_shows_each_image_once_in_microbatches():
  given = data()
  assert given.epoch_steps == 3
  found = steps(given, 4, seeds=0, start_step=0)
  assert [step for step, _ in found] == [0, 1, 2, 3]
  assert [len(parts) for _, parts in found] == [2, 2, 2, 2]  # 4, 4, 3 images
  epoch = [part for _, parts in found[:3] for part in parts]
  seen = np.concatenate([part["example"] for part in epoch])[:, 0]
  assert sorted(seen[seen >= 0]) == list(range(11))
  train = given.splits["train"]
  for part in epoch:
    real = part["example"][:, 0] >= 0
    np.testing.assert_array_equal(part["weights"][:, 0], real)
    images = part["example"][real, 0]
    want = PLAIN.normalise(train.pixels[images])
    np.testing.assert_array_equal(part["pixel_values"][real], want)
    np.testing.assert_array_equal(part["labels"][real, 0], train.labels[images])
    assert not part["pixel_values"][~real].any()


def test_any_start_any_run_and_any_process_has_the_same():
  """Flips and shifts too: they are drawn for the batch, whoever makes it."""
  given = data(flip=True, shift=1)
  found = steps(given, 5, seeds=3, start_step=0)
  for (step, parts), (other, later) in zip(
    found[2:], steps(given, 3, seeds=3, start_step=2), strict=True
  ):
    assert step == other
    for one, two in zip(parts, later, strict=True):
      equal(one, two)
  starts = [given.epoch_steps, 0]
  together = steps(given, 2, seeds=[8, 3], start_step=starts)
  for (_, parts), (_, stacked) in zip(found, together, strict=False):
    for one, both in zip(parts, stacked, strict=True):
      equal(one, {name: x[1] for name, x in both.items()})
  halves = [
    steps(
      given._replace(shard=ProcessShard(i, i + 1, 2)), 2, seeds=3, start_step=0
    )
    for i in range(2)
  ]
  for (_, parts), (_, low), (_, high) in zip(found, *halves, strict=False):
    for whole, *both in zip(parts, low, high, strict=True):
      equal(
        whole, {n: np.concatenate([half[n] for half in both]) for n in whole}
      )


def test_flips_and_shifts_are_of_the_picture():
  """Each varied image is the image mirrored or not, and moved by a pixel or
  not, with its edge repeated."""
  images = split(40).pixels
  varied = data(flip=True, shift=1).varied(images, np.random.default_rng(0))
  used = set()
  for image, found in zip(images, varied, strict=True):
    edge = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
    for flip, down, right in itertools.product((0, 1), (0, 1, 2), (0, 1, 2)):
      moved = edge[down : down + 6, right : right + 5]
      if np.array_equal(found, moved[:, ::-1] if flip else moved):
        used.add((flip, down, right))
        break
    else:
      raise AssertionError
  assert len(used) > 10
  assert data().varied(images, np.random.default_rng(0)) is images


@pytest.mark.parametrize("shard", [ProcessShard(), ProcessShard(1, 2, 2)])
def test_evaluation_is_in_order_and_samples_have_the_shapes(shard):
  given = data(shard=shard)
  batches = list(given.eval_batches("dev"))
  seen = np.concatenate([b["example"] for b in batches])[:, 0].tolist()
  assert seen == ([*range(7), -1] if shard.of == 1 else [2, 3, 6, -1])
  numbers = data().measured("dev", lambda batch: batch["example"])
  assert numbers.tolist() == list(range(7))
  whole = data()
  for sample, batch in (
    (given.eval_sample(), next(whole.eval_batches("dev"))),
    (
      next(given.train_samples()),
      steps(whole, 1, seeds=0, start_step=0)[0][1][0],
    ),
  ):
    shapes = [
      {n: (x.shape, x.dtype) for n, x in b.items()} for b in (sample, batch)
    ]
    assert shapes[0] == shapes[1]
  stacked = next(given.train_samples(runs=3))
  assert stacked["pixel_values"].shape == (3, 2, 6, 5, 3)
