"""Images are prepared as the checkpoint says, and unreadable ones are named."""

import io
import json
import os
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.pictures import PREPROCESSOR, picture
from vera_jax.data import images
from vera_jax.data.image_files import open_folder
from vera_jax.data.images import Processor, prepare_images, read_processor
from vera_jax.errors import UserError

PLAIN = Processor(0, 8, 8, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)
CROPPED = {  # as DINOv2's checkpoints have it
  "crop_size": {"height": 8, "width": 8},
  "do_center_crop": True,
  "do_convert_rgb": True,
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
  "resample": 3,
  "size": {"shortest_edge": 10},
}


def processor(folder, fields, **options):
  (folder / "preprocessor_config.json").write_text(json.dumps(fields))
  return read_processor(folder, **options)


@pytest.mark.parity
@pytest.mark.parametrize(
  "name, fields",
  [("vit.image_processing_pil_vit.ViT", PREPROCESSOR),
   ("bit.image_processing_pil_bit.Bit", CROPPED)],
)  # fmt: skip
def test_pixels_are_those_of_transformers(name, fields, tmp_path):
  """On tall, wide and large pictures; bytes to the last one, then floats."""
  pytest.importorskip("torch")
  import importlib

  module, _, kind = f"transformers.models.{name}".rpartition(".")
  peer = getattr(importlib.import_module(module), f"{kind}ImageProcessorPil")
  ours = processor(tmp_path, fields)
  rng = np.random.default_rng(0)
  for shape in ((10, 12), (31, 17), (12, 40)):
    given = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    want = peer(**fields)(given, return_tensors="np")["pixel_values"][0]
    found = ours.normalise(ours.prepare(given))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want.transpose(1, 2, 0), atol=1e-5)


def test_a_size_of_ones_own_keeps_the_share_that_is_cut_off(tmp_path):
  made = processor(tmp_path, CROPPED, size=16)
  assert (made.edge, made.height, made.width) == (20, 16, 16)
  made = processor(tmp_path, PREPROCESSOR, size=16)
  assert (made.edge, made.height, made.width) == (0, 16, 16)
  old = processor(tmp_path, {**PREPROCESSOR, "size": 24})  # before size was two
  assert (old.height, old.width, old.scale) == (24, 24, 1 / 255)
  assert old.mean == (0.5,) * 3


OFF = {name: None for name in ("do_resize", "do_rescale", "do_normalize")}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ViT", "Bit"])
def test_each_field_is_followed_as_in_transformers_or_refused(kind, tmp_path):
  pytest.importorskip("torch")
  import importlib

  name = f"{kind.lower()}.image_processing_pil_{kind.lower()}"
  module = importlib.import_module(f"transformers.models.{name}")
  peer = getattr(module, f"{kind}ImageProcessorPil")
  base = {"ViT": PREPROCESSOR, "Bit": CROPPED}[kind]
  base = {**base, "image_processor_type": f"{kind}ImageProcessor"}
  edges = {"shortest_edge": 10, "longest_edge": 12}
  pad = {"do_pad": True, "pad_size": {"height": 30, "width": 30}}
  given = np.random.default_rng(0).integers(0, 256, (36, 31, 3), dtype=np.uint8)
  refused = 0
  for change in (
    *({name: value} for name, value in OFF.items()),
    *({name: False} for name in (*OFF, "do_center_crop", "do_convert_rgb")),
    *({"resample": n} for n in (0, 1, 3)),
    *({"size": size} for size in (8, [8, 8], edges, {"longest_edge": 9})),
    {"default_to_square": False, "size": 9},
    {"rescale_factor": 1 / 127.5},
    {"do_center_crop": True, "crop_size": 8},
    pad,
    *(dict.fromkeys([name], ...) for name in base),  # left out
  ):
    fields = {k: v for k, v in {**base, **change}.items() if v is not ...}
    try:
      ours = processor(tmp_path, fields)
    except UserError:
      refused += 1
      continue
    fields.pop("image_processor_type", None)
    if "image_processor_type" in change and kind == "Bit":
      continue  # the network's config.json says it then
    want = peer(**fields)(Image.fromarray(given), return_tensors="np")
    found = ours.normalise(ours.prepare(Image.fromarray(given)))
    np.testing.assert_allclose(
      found,
      want["pixel_values"][0].transpose(1, 2, 0),
      atol=1e-3,
      err_msg=f"{change}",
    )
  assert refused < 15


def test_a_preparation_says_what_is_left_out_by_its_class(tmp_path, caplog):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
  colours = {name: PREPROCESSOR[name] for name in ("image_mean", "image_std")}
  made = processor(tmp_path, colours)
  assert (made.edge, made.height, made.resample) == (224, 224, 3)
  made = processor(tmp_path, {**colours, "image_processor_type": "ViT", "x": 1})
  assert (made.edge, made.height, made.resample) == (0, 224, 2)
  assert "not looked at: ['x']" in caplog.text
  with pytest.raises(UserError, match="'default_to_square'|'do_resize'"):
    processor(tmp_path, {**colours, "image_processor_type": "ConvNext"})


def test_turned_grey_and_transparent_pictures():
  given = picture((200, 50, 40), 0)
  turned = Image.Exif()
  turned[0x0112] = 6  # the camera was held sideways
  file = io.BytesIO()
  given.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=turned)
  want = PLAIN.prepare(given)
  np.testing.assert_array_equal(PLAIN.prepare(file.getvalue()), want)
  for mode in ("L", "P", "RGBA", "1"):
    assert PLAIN.prepare(given.convert(mode)).shape == (8, 8, 3)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"do_resize": False}, "do_resize is false"),
    ({"do_pad": True}, "do_pad true"),
    ({"size": {"shortest_edge": 10}}, "sizes of their own"),
    ({"resample": 77}, "77 is not a valid Resampling"),
    ({**CROPPED, "size": {"shortest_edge": 4}}, "4 pixels have no room"),
    ({"size": {"height": 10**9, "width": 8}}, "more than 4096 pixels a side"),
    ({"size": {"height": 8.5, "width": 8}}, "8.5 is no number of pixels"),
    ({"image_std": [1.0, 0.0, 1.0]}, "not those of three colours"),
  ],
)
def test_a_preparation_that_is_not_known_here(fields, message, tmp_path):
  with pytest.raises(UserError, match=message):
    processor(tmp_path, {**PREPROCESSOR, **fields})
  (tmp_path / "preprocessor_config.json").unlink()
  with pytest.raises(UserError, match="says how images are prepared"):
    read_processor(tmp_path)


def test_unreadable_files_are_named_and_left_out(tmp_path, monkeypatch):
  """And what is cached is what was decoded, until a file changes."""
  for i in range(6):
    (tmp_path / "data/one").mkdir(parents=True, exist_ok=True)
    picture((9 * i, 0, 0), i).save(tmp_path / f"data/one/{i}.png")
  cut = tmp_path / "data/one/2.png"
  cut.write_bytes(cut.read_bytes()[:60])
  (tmp_path / "data/one/4.png").write_text("no picture")
  files = open_folder(tmp_path / "data").splits["train"]
  numbers = np.array([1, 2, 3, 4, 5])
  cache = tmp_path / "cache"
  made = prepare_images(files, numbers, PLAIN, cache)
  assert len(made) == len(made.names) == len(made.pixels) == 3
  assert [name[-5:] for name in made.names] == ["1.png", "3.png", "5.png"]
  assert [x.split("one/")[1][:5] for x in made.unreadable] == ["2.png", "4.png"]
  for pixels, name in zip(made.pixels, made.names, strict=True):
    np.testing.assert_array_equal(pixels, PLAIN.prepare(Image.open(name)))
  assert len(list(cache.iterdir())) == 2

  def decoded_again(*args):
    raise AssertionError

  with monkeypatch.context() as patch:
    patch.setattr(images, "_decode", decoded_again)
    again = prepare_images(files, numbers, PLAIN, cache)
    assert again.unreadable == made.unreadable
    np.testing.assert_array_equal(again.pixels, made.pixels)
  larger = prepare_images(files, numbers, PLAIN._replace(height=9), cache)
  assert larger.pixels.shape == (3, 9, 8, 3)
  picture((0, 0, 99), 7).save(cut)
  mended = prepare_images(files, numbers, PLAIN, cache)
  assert len(mended) == 4 and mended.fingerprint != made.fingerprint
  expected = np.array(mended.pixels)  # which are the file's own
  for damaged in (b"half a fi", b""):
    (cache / f"{mended.fingerprint}.rgb").write_bytes(damaged)
    again = prepare_images(files, numbers, PLAIN, cache)
    np.testing.assert_array_equal(again.pixels, expected)
  (tmp_path / "data/one/2.png").write_text("nor this")
  with pytest.raises(UserError, match="None of the 2 images can be read"):
    prepare_images(files, np.array([2, 4]), PLAIN, cache)


@pytest.mark.parametrize("kind", images.FORMATS)
def test_each_format_of_the_list_is_decoded(kind):
  file = io.BytesIO()
  picture((200, 50, 40), 0).save(file, kind)
  assert PLAIN.prepare(file.getvalue()).shape == (8, 8, 3)


def test_no_program_is_started(tmp_path, monkeypatch):
  """Pillow gives EPS, whatever the file's name, to the `gs` in PATH."""
  program, started = tmp_path / "gs", tmp_path / "started"
  program.write_text(f"#!/bin/sh\ntouch {started}\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
  eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
  (made,) = images.decode_all([eps], PLAIN)
  assert "cannot identify image" in str(made) and not started.exists()


def test_a_thread_of_an_image_is_cut_before_it_is_resized(monkeypatch):
  cropped = PLAIN._replace(edge=10)
  for size in ((1, 60_000), (60_000, 1), (3, 50_000)):
    thread = Image.new("RGB", size, (9, 8, 7))
    monkeypatch.setattr(images, "RESIZED", 10**5)
    pixels = cropped.prepare(thread)
    assert pixels.shape == (8, 8, 3) and (pixels == (9, 8, 7)).all()
  # the same as from the whole, but for rounding
  rng = np.random.default_rng(0)
  for shape in ((31, 17, 3), (12, 40, 3), (9, 9, 3)):
    given = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    for filter in (0, 2, 3):
      processor = cropped._replace(resample=filter)
      monkeypatch.setattr(images, "RESIZED", 10**5)
      whole = processor.prepare(given).astype(int)
      monkeypatch.setattr(images, "RESIZED", 0)
      assert abs(processor.prepare(given) - whole).max() <= 1


def test_large_images_are_decoded_one_after_another(monkeypatch):
  monkeypatch.setattr(images, "PIXELS", 200)
  monkeypatch.setattr(images, "_ROOM", images._Room())
  now, most = [], []

  def slow(image, **_):  # 120 pixels each
    now.append(image)
    time.sleep(0.01)
    most.append(len(now))
    now.remove(image)

  monkeypatch.setattr(ImageOps, "exif_transpose", slow)
  file = io.BytesIO()
  picture((200, 50, 40), 0).save(file, "PNG")
  made = list(images.decode_all([file.getvalue()] * 6, PLAIN))
  assert len(made) == 6 and most == [1] * 6
  assert not any(isinstance(x, Exception) for x in made)


def test_encoded_images_are_not_all_in_memory(monkeypatch):
  monkeypatch.setattr(images, "ENCODED", 100)
  taken = []

  def source():
    for i in range(20):
      taken.append(i)
      yield b"x" * 30

  made = images.decode_all(source(), PLAIN)
  assert isinstance(next(made), OSError) and len(taken) == 4
  assert len(list(made)) == 19


def test_without_a_place_for_the_cache_all_is_in_memory(tiny_images, tmp_path):
  files = open_folder(tiny_images).splits["train"]
  (tmp_path / "file").write_text("")
  made = prepare_images(files, np.arange(4), PLAIN, tmp_path / "file/cache")
  kept = prepare_images(files, np.arange(4), PLAIN, tmp_path / "cache")
  np.testing.assert_array_equal(made.pixels, kept.pixels)
