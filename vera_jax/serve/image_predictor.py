"""Answers of a trained classifier to images."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int

from vera_jax.data.image_files import ImageFile
from vera_jax.data.images import Processor, decode_all, read_processor
from vera_jax.data.packing import Batch
from vera_jax.errors import UserError
from vera_jax.models.family import IMAGES
from vera_jax.places import local_copy
from vera_jax.pretrained.classifier import Classifier
from vera_jax.serve.predictor import (
  ROWS,
  Answer,
  Logits,
  answers,
  check_finite,
)

Pixels = Float32[np.ndarray, "images height width 3"]
Images = Sequence[Any]  # paths, the bytes of files, or Pillow's images


class ImagePredictor:
  """A classifier of images, compiled for a few batch sizes."""

  def __init__(
    self, classifier: Classifier, *, image_size: int | None = None
  ) -> None:
    """`image_size` is the pixels of a side; None: as in training."""
    if classifier.family.reads != IMAGES:
      raise UserError(
        f"The model in {classifier.folder} reads {classifier.family.reads}. Use"
        " a Predictor."
      )
    self.classifier, self.labels = classifier, classifier.labels
    self.processor = processor_of(classifier, image_size)
    self._apply = jax.jit(classifier.module.apply)

  def logits(self, images: Images) -> Logits:
    """What the head gives for every image, in their order.

    Args:
      images: paths, the bytes of image files, or Pillow's images.

    Raises:
      UserError: an image that can't be read; a logit is not a finite number.
    """
    return self.logits_of(read_images(images, self.processor))

  def logits_of(self, pixels: Pixels) -> Logits:
    """As `logits`, for images that are prepared and normalised."""
    outputs = self.classifier.outputs
    return check_finite(image_logits(self._run, pixels, outputs=outputs))

  def answers(self, images: Images) -> list[Answer]:
    """Label, score and probabilities of every image, in their order."""
    return self.named(self.logits(images))

  def named(self, logits: Logits) -> list[Answer]:
    """The answers that logits stand for."""
    return list(answers(logits, self.labels, kind=self.classifier.kind))

  def _run(self, batch: Batch) -> jax.Array:
    pixels = batch["pixel_values"]
    return self._apply(self.classifier.variables, pixel_values=pixels)


def processor_of(classifier: Classifier, size: int | None = None) -> Processor:
  """How the classifier's images are prepared: as in training, or for `size`."""
  size = size or classifier.about.get("image_size")
  return read_processor(classifier.folder, size=size)


def read_images(images: Images, processor: Processor) -> Pixels:
  """Images prepared and normalised.

  Raises:
    UserError: one can't be read; the message names it.
  """
  shape = (len(images), processor.height, processor.width, 3)
  pixels = np.empty(shape, np.float32)
  files = [
    ImageFile(local_copy(x), None) if isinstance(x, str | Path) else x
    for x in images
  ]
  for number, made in enumerate(decode_all(files, processor)):
    if isinstance(made, Exception):
      name = getattr(files[number], "path", "given")
      raise UserError(f"Image {number}, {name}, can't be read: {made}.")
    pixels[number] = processor.normalise(made)
  return pixels


def image_logits(
  run: Callable[[Batch], jax.Array],
  pixels: Pixels,
  *,
  outputs: int,
  adapters: Int[np.ndarray, " images"] | None = None,
) -> Logits:
  """The logits of every image, in batches of few sizes.

  Args:
    run: a batch -> its logits.
    pixels: normalised.
    outputs: the number of logits per image.
    adapters: the adapter of each image, which `adapter` in a batch has; None:
      all have the same.
  """
  out = np.empty((len(pixels), outputs), np.float32)
  for first in range(0, len(pixels), ROWS[-1]):
    here = slice(first, first + ROWS[-1])
    count = len(pixels[here])
    rows = next(rows for rows in ROWS if rows >= count)
    batch = {"pixel_values": _padded(pixels[here], rows)}
    if adapters is not None:
      batch["adapter"] = _padded(adapters[here].astype(np.int32), rows)
    out[here] = np.asarray(run(batch))[:count, 0]
  return out


def _padded(values: np.ndarray, rows: int) -> np.ndarray:
  """With copies of the first row behind, which nothing is read of."""
  filler = np.repeat(values[:1], rows - len(values), axis=0)
  return np.concatenate([values, filler])


def answer_files(
  predictor: ImagePredictor, files: Iterable[ImageFile], *, at_once: int
) -> Iterator[tuple[Path, Answer | str]]:
  """Each file with its answer, or the reason why it has none.

  `at_once` of them are answered together.
  """
  files = iter(files)
  while chunk := list(itertools.islice(files, at_once)):
    made = list(decode_all(chunk, predictor.processor))
    good = [x for x in made if not isinstance(x, Exception)]
    answered: Iterator[Answer] = iter(())
    if good:
      pixels = predictor.processor.normalise(np.stack(good))
      answered = iter(predictor.named(predictor.logits_of(pixels)))
    for (path, _), image in zip(chunk, made, strict=True):
      yield path, str(image) if isinstance(image, Exception) else next(answered)
