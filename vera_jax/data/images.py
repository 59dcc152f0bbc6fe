"""Images to arrays: decoded, resized and cached; and their batches.

How an image is prepared is what the checkpoint's preprocessor_config.json
says. Prepared images are kept as bytes in one file, whose name is a hash of
everything that decides its content; batches normalise them.
"""

import ctypes
import hashlib
import io
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from vera_jax.data.image_files import Encoded, ImageFile, ImageFiles
from vera_jax.errors import UserError, install
from vera_jax.files import TENSORS, check_file, read_json, say_uncached
from vera_jax.models.family import family_of

if TYPE_CHECKING:
  from PIL import Image

log = logging.getLogger(__name__)

CONFIG = "preprocessor_config.json"
VERSION = 1  # of the cached form
CHUNK = 1024  # encoded images that are in memory at once
SHOWN = 3  # unreadable images that a message names
# What the endings in `image_files.SUFFIXES` stand for. Pillow decides by a
# file's content and knows many more, of which some start another program: EPS
# is given to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# What transformers' classes do where a file says nothing, by how the class's
# name begins, or where the file names none, the network's.
OLDER = "feature_extractor_type"
_ALWAYS = {
  **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
  "rescale_factor": 1 / 255,
}
_VIT = {
  **_ALWAYS,
  "size": {"height": 224, "width": 224},
  "default_to_square": True,
  "do_center_crop": False,
  "resample": 2,
}
_BIT = {
  **_ALWAYS,
  "size": {"shortest_edge": 224},
  "default_to_square": False,
  "do_center_crop": True,
  "crop_size": 224,
  "resample": 3,
}
CLASSES: dict[str, dict[str, Any]] = {"ViT": _VIT, "Bit": _BIT}
USED = frozenset({*_VIT, *_BIT, "do_pad", "image_mean", "image_std"})
# Images are RGB here always; the others are of programs and of other tasks.
UNUSED = frozenset(
  f"{OLDER} _valid_processor_keys data_format device disable_grouping"
  " do_convert_rgb do_reduce_labels image_processor_type input_data_format"
  " pad_size processor_class return_tensors".split()
)
LARGEST = 4096  # pixels of a prepared image's side
# Pixels of all images that are decoded at one moment, each in eight bytes at
# most; Pillow refuses an image of more.
PIXELS = 2 * (2**30 // 12)
LARGE = 2**24  # pixels of an image whose memory is given back at once
RESIZED = 2**25  # pixels of a whole image that is resized before it is cut
ENCODED = 2**28  # bytes of encoded images that are in memory at once
ORIENTATION = 0x0112  # of the camera, among EXIF's entries
Pixels = UInt8[np.ndarray, "height width 3"]


class Processor(NamedTuple):
  """How an image becomes an array.

  Attributes:
    edge: how many pixels the shorter side is resized to before the middle is
      cut out; 0 where the image is resized to height and width at once.
    height, width: the pixels of a prepared image.
    resample: Pillow's number of the filter.
    scale, mean, std: a value x becomes (x * scale - mean) / std, by colour.
  """

  edge: int
  height: int
  width: int
  resample: int
  scale: float
  mean: tuple[float, ...]
  std: tuple[float, ...]

  def prepare(self, encoded: "Encoded | Image.Image") -> Pixels:
    """Decode and resize.

    Raises:
      Exception: of any kind where it can't be read, for decoders raise many.
    """
    from PIL import Image, ImageOps

    if isinstance(encoded, bytes | ImageFile):
      # a file is read whole, so that none stays open
      file = io.BytesIO(_content(encoded))
      with (
        Image.open(file, formats=FORMATS) as opened,
        _ROOM.taken(opened.width * opened.height),
      ):
        ImageOps.exif_transpose(opened, in_place=True)
        made = self.prepare(opened)
        opened.close()  # before its room is another's
        return made
    # a copy of a large image is not made in vain
    image = encoded
    if image.getexif().get(ORIENTATION, 1) != 1:
      image = ImageOps.exif_transpose(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    size, filter = (self.width, self.height), Image.Resampling(self.resample)
    if not self.edge:
      return np.asarray(image.resize(size, filter))
    short = min(image.size)
    wide, tall = (self.edge * side // short for side in image.size)
    left, top = (wide - self.width) // 2, (tall - self.height) // 2
    box = left, top, left + self.width, top + self.height
    if wide * tall <= RESIZED:
      return np.asarray(image.resize((wide, tall), filter).crop(box))
    # Of a thread of an image the middle alone is resized. It is the same up to
    # the rounding of where it begins.
    across, down = image.width / wide, image.height / tall
    right, bottom = min(wide, box[2]) * across, min(tall, box[3]) * down
    part = (
      left * across,
      top * down,
      min(right, image.width),
      min(bottom, image.height),
    )
    return np.asarray(image.resize(size, filter, box=part))

  def normalise(
    self, pixels: UInt8[np.ndarray, "*rows height width 3"]
  ) -> Float32[np.ndarray, "*rows height width 3"]:
    std = np.array(self.std, np.float32)
    factor = np.float32(self.scale) / std
    return pixels * factor - np.array(self.mean, np.float32) / std


class _Room:
  """Pixels that may be decoded at one moment, by all threads together."""

  def __init__(self) -> None:
    self._left, self._given_back = PIXELS, threading.Condition()

  @contextmanager
  def taken(self, pixels: int) -> Iterator[None]:
    """Waits until there is room for so many."""
    pixels = min(pixels, PIXELS)
    with self._given_back:
      self._given_back.wait_for(lambda: self._left >= pixels)
      self._left -= pixels
    try:
      yield
    finally:
      if pixels > LARGE and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)  # else glibc keeps as much for each thread
      with self._given_back:
        self._left += pixels
        self._given_back.notify_all()


_ROOM, _LIBC = _Room(), ctypes.CDLL(None)


def read_processor(folder: Path, *, size: int | None = None) -> Processor:
  """How a checkpoint's preprocessor_config.json has images prepared.

  Args:
    folder: the checkpoint's.
    size: pixels of each side in place of the file's; what is resized before
      the middle is cut out keeps its share.

  Raises:
    UserError: there is no such file, or it says what isn't known here; or
      there is no Pillow, which nobody needs who has no images.
  """
  try:
    from PIL import Image
  except ImportError as error:
    raise UserError(f"Images need pillow: {install('images')}") from error
  file = folder / CONFIG
  hint = f"{CONFIG} says how images are prepared; copy it from the checkpoint."
  written = read_json(file, hint=hint)
  unknown = sorted(written.keys() - USED - UNUSED)
  if unknown:
    log.warning("%s: not known here, and not looked at: %s.", file, unknown)
  kind = written.get("image_processor_type", written.get(OLDER))
  if kind is None:
    path = folder / "config.json"
    kind = family_of(read_json(path)).processor if path.is_file() else "ViT"
  usual = (x for start, x in CLASSES.items() if str(kind).startswith(start))
  fields = {"do_pad": False, **next(usual, {}), **written}

  def pixels(value: Any) -> int:
    if type(value) is not int:  # True is an int as well
      raise ValueError(f"{value!r} is no number of pixels")
    return value

  def sides(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
      return pixels(value["height"]), pixels(value["width"])
    return pixels(value), pixels(value)

  try:
    if not fields["do_resize"] or fields["do_pad"]:
      raise ValueError("do_resize is false, or do_pad true")
    target, edge = fields["size"], 0
    if isinstance(target, int) and not fields["default_to_square"]:
      target = {"shortest_edge": target}
    if isinstance(target, Mapping) and "shortest_edge" in target:
      edge = pixels(target["shortest_edge"])
      if not fields["do_center_crop"] or target.get("longest_edge"):
        raise ValueError("images would keep sizes of their own")
      target = fields["crop_size"]
    elif fields["do_center_crop"]:
      if sides(fields["crop_size"]) != sides(target):
        raise ValueError("size and crop_size differ")
    height, width = sides(target)
    if size is not None:
      if height != width:
        raise ValueError("its images are not square")
      edge, height, width = round(edge * size / height), size, size
    if max(edge, height, width) > LARGEST:
      raise ValueError(f"images of more than {LARGEST} pixels a side")
    if edge and edge < max(height, width) or min(height, width) < 1:
      raise ValueError(f"{edge} pixels have no room for {height} x {width}")
    plain = not fields["do_normalize"]
    mean = (0.0,) * 3 if plain else tuple(map(float, fields["image_mean"]))
    std = (1.0,) * 3 if plain else tuple(map(float, fields["image_std"]))
    if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
      raise ValueError(
        "image_mean and image_std are not those of three colours"
      )
    return Processor(
      edge=edge,
      height=height,
      width=width,
      resample=int(Image.Resampling(fields["resample"])),
      scale=float(fields["rescale_factor"]) if fields["do_rescale"] else 1.0,
      mean=mean,
      std=std,
    )
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise UserError(f"{file} can't be followed here: {error}.") from error


@dataclass(frozen=True)
class Prepared:
  """The prepared images of a split.

  Attributes:
    pixels: all images that can be read.
    labels: the class of each image.
    names: the name of each image.
    unreadable: the names of the files that are left out, with the reason.
    fingerprint: sha256 over the files, their labels and the preparation.
  """

  pixels: UInt8[np.ndarray, "images height width 3"]
  labels: Int32[np.ndarray, " images"]
  names: list[str]
  unreadable: list[str]
  fingerprint: str

  def __len__(self) -> int:
    return len(self.labels)


def prepare_images(
  files: ImageFiles,
  numbers: np.ndarray,
  processor: Processor,
  cache: Path,
) -> Prepared:
  """Decode and resize some of a split's images, or take them from the cache.

  Args:
    files: the split's images.
    numbers: which of them are wanted, ascending.
    processor: how they are prepared.
    cache: the folder of prepared images. If it can't be written, all happens
      in memory.

  Raises:
    UserError: not one of them can be read.
  """
  labels = files.labels[numbers]
  sha = hashlib.sha256(
    f"vera_jax images {VERSION} {version('pillow')}".encode()
  )
  sha.update(json.dumps(processor[:4]).encode() + labels.tobytes())
  for encoded in files.read(numbers):
    try:
      sha.update(hashlib.sha256(_content(encoded)).digest())
    except UserError as error:  # the file is named when it is decoded
      sha.update(str(error).encode())
  fingerprint = sha.hexdigest()
  stored, lines = cache / f"{fingerprint}.rgb", cache / f"{fingerprint}.json"
  shape = (len(numbers), processor.height, processor.width, 3)
  try:
    check_file(stored, inside=cache, limit=TENSORS)
    if stored.stat().st_size != math.prod(shape):
      raise ValueError
    pixels: np.ndarray = np.memmap(stored, np.uint8, mode="r", shape=shape)
    reasons = {int(i): str(why) for i, why in read_json(lines).items()}
    if not reasons.keys() <= {*range(len(numbers))}:
      raise ValueError
  except (OSError, ValueError, UserError):  # missing or damaged
    try:
      cache.mkdir(parents=True, exist_ok=True)
      # both files by renaming, so that no process reads a half one
      with tempfile.TemporaryDirectory(dir=cache) as part:
        new = Path(part) / "new.rgb", Path(part) / "new.json"
        pixels = np.memmap(new[0], np.uint8, mode="w+", shape=shape)
        reasons = _decode(files, numbers, processor, pixels)
        pixels.flush()
        new[1].write_text(json.dumps(reasons))
        new[1].replace(lines)
        new[0].replace(stored)
    except OSError as error:
      say_uncached(cache, error.strerror)
      pixels = np.empty(shape, np.uint8)
      reasons = _decode(files, numbers, processor, pixels)
  good = np.array([i not in reasons for i in range(len(numbers))], bool)
  if not good.any():
    raise UserError(
      f"None of the {len(numbers)} images can be read, the first one is"
      f" {files.names[numbers[0]]}: {reasons[0]}."
    )
  names = [files.names[number] for number in numbers.tolist()]
  return Prepared(
    pixels[: good.sum()],  # unreadable ones are not in between
    labels[good],
    [name for name, is_good in zip(names, good, strict=True) if is_good],
    [f"{names[i]} ({why})" for i, why in reasons.items()],
    fingerprint,
  )


def decode_all(
  images: Iterable[Any], processor: Processor
) -> Iterator[Pixels | Exception]:
  """Each image prepared, or the reason why it can't be, on all cores."""

  def one(encoded: Any) -> Pixels | Exception:
    try:
      return processor.prepare(encoded)
    except Exception as error:  # whatever it is, the image is left out
      return error

  # Pillow works without Python's lock, so threads are enough.
  with ThreadPoolExecutor(os.cpu_count()) as workers:
    chunk: list[Any] = []
    size = 0
    for encoded in images:
      chunk.append(encoded)
      size += len(encoded) if isinstance(encoded, bytes) else 0
      if len(chunk) == CHUNK or size > ENCODED:
        yield from workers.map(one, chunk)
        chunk, size = [], 0
    yield from workers.map(one, chunk)


def _decode(
  files: ImageFiles,
  numbers: np.ndarray,
  processor: Processor,
  pixels: UInt8[np.ndarray, "images height width 3"],
) -> dict[int, str]:
  """Fills `pixels` from the front; returns why images are left out."""
  reasons: dict[int, str] = {}
  for number, made in enumerate(decode_all(files.read(numbers), processor)):
    if isinstance(made, Exception):
      reasons[number] = " ".join(str(made).split()) or type(made).__name__
    else:
      pixels[number - len(reasons)] = made
  return reasons


def _content(encoded: Encoded) -> bytes:
  return encoded if isinstance(encoded, bytes) else encoded.read()
