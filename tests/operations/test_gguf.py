"""GGUF files: every format by its definition, round trips, damaged files."""

import os
import struct

import numpy as np
import pytest

from vera_jax.errors import UserError
from vera_jax.models.gguf_file import (
  Written,
  decode,
  encode,
  files_of,
  read_gguf,
  write_gguf,
)
from vera_jax.models.gguf_folder import gguf_folder

RNG = np.random.default_rng(0)
METADATA = {
  "general.architecture": "llama",
  "a.number": 7,
  "a.float": 0.5,
  "a.switch": True,
  "a.list": ["river", "", "ü"],
  "some.ids": np.array([3, -1], np.int32),
  "some.scores": np.array([0.25, -2], np.float32),
}


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_decoded_by_their_definition(format):
  codes = RNG.integers(0, 256, (3, 32 if format == "Q8_0" else 16), np.uint8)
  scales, minima = [0.5, -0.125, 3.0], [1.5, -2.0, 0.0]
  stored, expected = b"", []
  for scale, minimum, block in zip(scales, minima, codes, strict=True):
    stored += struct.pack("<e", scale)
    if format == "Q4_1":
      stored += struct.pack("<e", minimum)
    stored += block.tobytes()
    if format == "Q8_0":
      expected += [scale * code for code in struct.unpack("32b", block)]
      continue
    for code in [byte % 16 for byte in block] + [byte // 16 for byte in block]:
      expected.append(
        scale * int(code) + minimum
        if format == "Q4_1"
        else scale * (int(code) - 8)
      )
  found = decode(np.frombuffer(stored, np.uint8), format=format, shape=(1, 96))
  assert found.dtype == np.float32 and found.tolist() == [expected]


def test_q8_0_rounds_to_the_nearest_code():
  values = RNG.standard_normal((4, 64)).astype(np.float32)
  values[1] = 0
  values[2, :32] *= 1e-30  # a scale that float16 has no number for
  stored = np.frombuffer(encode(values, format="Q8_0"), np.uint8)
  found = decode(stored, format="Q8_0", shape=values.shape)
  scale = np.abs(values.reshape(-1, 32)).max(1) / 127
  error = np.abs(found - values).reshape(-1, 32).max(1)
  # half a step, and float16's rounding of the scale
  assert (error <= scale * (0.5 + 127 * 2**-11) + 1e-29).all()
  assert not found[1].any() and not found[2, :32].any()


@pytest.mark.parametrize("format", ["F16", "Q8_0"])
def test_values_beyond_a_format_are_refused(format, tmp_path):
  values = np.full((1, 32), 1e8, np.float32)
  tensors = {"big.weight": Written(format, values.shape, lambda: values)}
  with pytest.raises(UserError, match=f"big.weight: {format} can't hold"):
    write_gguf(tmp_path / "a.gguf", {}, tensors)
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def arrays():
  return {
    "F32": RNG.standard_normal(5).astype(np.float32),
    "F16": RNG.standard_normal((3, 7)).astype(np.float16),
    "BF16": RNG.standard_normal((2, 3, 4)).astype(np.float32),
    "Q8_0": RNG.standard_normal((3, 64)).astype(np.float32),
  }


@pytest.fixture(scope="module")
def written(arrays, tmp_path_factory):
  file = tmp_path_factory.mktemp("gguf") / "a.gguf"
  tensors = {
    f"{format}.weight": Written(format, x.shape, lambda x=x: x)
    for format, x in arrays.items()
  }
  write_gguf(file, METADATA, tensors)
  return file


def test_what_is_written_is_read(written, arrays):
  found = read_gguf(written)
  assert found.metadata.keys() == METADATA.keys()
  for key, value in METADATA.items():
    assert np.array_equal(found.metadata[key], value), key
  for format, values in arrays.items():
    tensor = found.tensors[f"{format}.weight"]
    assert tensor.shape == values.shape and tensor.start % 32 == 0
    raw = np.frombuffer(encode(values, format=format), np.uint8)
    assert np.array_equal(found.stored(f"{format}.weight"), raw)
    again = found.values(f"{format}.weight")
    assert again.shape == values.shape
    if format in ("F32", "F16"):
      assert np.array_equal(again, values)
    np.testing.assert_allclose(
      again.astype(np.float32), values, rtol=2**-8, atol=0.02
    )


def changed(written, tmp_path, offset: int, letter: str, value):
  """A copy with another number at an offset."""
  data = bytearray(written.read_bytes())
  struct.pack_into(f"<{letter}", data, offset, value)
  file = tmp_path / "changed.gguf"
  file.write_bytes(data)
  return file


def place(written, text: bytes) -> int:
  """Where a text ends that the file has."""
  return written.read_bytes().index(text) + len(text)


def test_version_2_and_another_alignment_are_read(written, arrays, tmp_path):
  file = changed(written, tmp_path, 4, "I", 2)
  assert np.array_equal(read_gguf(file).values("F32.weight"), arrays["F32"])
  wide = tmp_path / "wide.gguf"
  one = {"x": Written("F32", (5,), lambda: arrays["F32"])}
  write_gguf(wide, {"general.alignment": 128}, one)
  data = wide.read_bytes()
  start = data.index(arrays["F32"].tobytes())
  data = data[:start].ljust(128, b"\0") + data[start:]
  wide.write_bytes(data)
  assert read_gguf(wide).tensors["x"].start == 128
  assert np.array_equal(read_gguf(wide).values("x"), arrays["F32"])


HUGE = 2**62
CHANGES = {
  "magic": (lambda w: 0, "I", 1, "no GGUF file"),
  "version 1": (lambda w: 4, "I", 1, "of version 1"),
  "big-endian": (lambda w: 4, "I", 3 << 24, "big-endian"),
  "too many tensors": (lambda w: 8, "Q", HUGE, "no whole GGUF file"),
  "too many entries": (lambda w: 16, "Q", HUGE, "no whole GGUF file"),
  "too long a key": (lambda w: 24, "Q", HUGE, "ends within its header"),
  "an unknown type": (
    lambda w: place(w, b"a.number"),
    "I",
    77,
    "has type 77",
  ),
  "too many texts": (
    lambda w: place(w, b"a.list") + 8,
    "Q",
    HUGE,
    "no whole GGUF file",
  ),
  "too many numbers": (
    lambda w: place(w, b"some.scores") + 8,
    "Q",
    HUGE,
    "ends within its header",
  ),
  "arrays of arrays": (
    lambda w: place(w, b"some.ids") + 4,
    "I",
    9,
    "an array has type 9",
  ),
  "a text that is none": (
    lambda w: place(w, b"a.list") + 24,
    "B",
    0xFF,
    "not UTF-8",
  ),
  "five axes": (lambda w: place(w, b"Q8_0.weight"), "I", 5, "has 5 axes"),
  "no weights": (
    lambda w: place(w, b"Q8_0.weight") + 4,
    "Q",
    0,
    "has the shape",
  ),
  "half a block": (
    lambda w: place(w, b"Q8_0.weight") + 4,
    "Q",
    48,
    "has the shape",
  ),
  "too large": (
    lambda w: place(w, b"Q8_0.weight") + 12,
    "Q",
    HUGE,
    "beyond the file's end",
  ),
  "Q8_K": (
    lambda w: place(w, b"Q8_0.weight") + 20,
    "I",
    15,
    "stored as Q8_K",
  ),
  "an unknown format": (
    lambda w: place(w, b"Q8_0.weight") + 20,
    "I",
    99,
    "stored as type 99",
  ),
  "too far": (
    lambda w: place(w, b"Q8_0.weight") + 24,
    "Q",
    HUGE,
    "beyond the file's end",
  ),
  "between two": (
    lambda w: place(w, b"Q8_0.weight") + 24,
    "Q",
    1,
    "has the shape",
  ),
  "on another": (
    lambda w: place(w, b"Q8_0.weight") + 24,
    "Q",
    0,
    "is not behind the one before",
  ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_file_is_refused(name, written, tmp_path):
  where, letter, value, words = CHANGES[name]
  file = changed(written, tmp_path, where(written), letter, value)
  with pytest.raises(UserError, match=words) as error:
    read_gguf(file)
  assert str(file) in str(error.value)


def test_an_odd_alignment_is_refused(tmp_path):
  write_gguf(tmp_path / "b.gguf", {"general.alignment": 24}, {})
  with pytest.raises(UserError, match="alignment is 24"):
    read_gguf(tmp_path / "b.gguf")


def parts(folder, *, count=3, **changed):
  """A model in parts with a tensor each; the first has the header."""
  names = [f"m-0000{i + 1}-of-0000{count}.gguf" for i in range(count)]
  for i, name in enumerate(names):
    keys = {"split.no": i, "split.count": count, "split.tensors.count": count}
    keys |= {"general.architecture": "llama"} if i == 0 else {}
    keys |= {key.replace("_", "."): x for key, x in changed.items()}
    value = np.full(4, i, np.float32)
    tensor = Written("F32", (4,), lambda value=value: value)
    write_gguf(folder / name, keys, {f"t{i}": tensor})
  return [folder / name for name in names]


def test_parts_are_read_as_one_model(tmp_path):
  first, *others = parts(tmp_path)
  model = read_gguf(first)
  assert model.metadata["general.architecture"] == "llama"
  assert [model.values(f"t{i}")[0] for i in range(3)] == [0, 1, 2]
  (tmp_path / "link.gguf").symlink_to(first.name)
  assert files_of(tmp_path / "link.gguf") == [first, *others]
  (tmp_path / "circle.gguf").symlink_to("circle.gguf")
  assert files_of(tmp_path / "circle.gguf") == [tmp_path / "circle.gguf"]


def test_parts_that_do_not_fit_are_refused(tmp_path):
  first, second, third = parts(tmp_path)
  with pytest.raises(UserError, match="not the first part .*name m-00001-of-0"):
    read_gguf(second)
  second.rename(tmp_path / "alone.gguf")
  with pytest.raises(UserError, match="lack m-00002-of-00003.gguf. Fetch"):
    read_gguf(first)
  with pytest.raises(UserError, match="alone.gguf says that it is part 1 "):
    read_gguf(tmp_path / "alone.gguf")
  third.rename(second)
  (tmp_path / "alone.gguf").rename(third)
  with pytest.raises(UserError, match="00002-of-00003.gguf says .* part 2 "):
    read_gguf(first)
  first, *_ = parts(tmp_path, split_tensors_count=4)
  with pytest.raises(UserError, match="have 3 tensors, not the 4 of the"):
    read_gguf(first)
  first, *_ = parts(tmp_path, split_count="many")
  with pytest.raises(UserError, match="part 0 .* of -1"):
    read_gguf(first)


def test_a_long_name_of_a_tensor_is_refused(tmp_path):
  one = {"x" * 64: Written("F32", (1,), lambda: np.zeros(1, np.float32))}
  write_gguf(tmp_path / "a.gguf", {}, one)
  with pytest.raises(UserError, match="more than 63 bytes"):
    read_gguf(tmp_path / "a.gguf")


def test_a_file_cut_anywhere_is_refused(written, tmp_path):
  data = written.read_bytes()
  last = max(x.start + x.size for x in read_gguf(written).tensors.values())
  file = tmp_path / "cut.gguf"
  for size in [0, *range(1, last, 7), last - 1]:
    file.write_bytes(data[:size])
    with pytest.raises(UserError, match="cut.gguf"):
      read_gguf(file)
  file.write_bytes(data[:last])  # padding behind the last tensor may lack
  assert read_gguf(file).values("Q8_0.weight").shape == (3, 64)


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match="can't be read"):
    read_gguf(tmp_path / "none.gguf")


def test_a_pipe_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / "a.gguf")
  for read in (read_gguf, gguf_folder):
    with pytest.raises(UserError, match="it is a pipe, not a regular file"):
      read(tmp_path / "a.gguf")


@pytest.mark.parity
def test_the_gguf_package_reads_what_we_write(written, arrays):
  gguf = pytest.importorskip("gguf")
  reader = gguf.GGUFReader(written)
  for key, value in METADATA.items():
    found = reader.fields[key].contents()
    assert np.array_equal(np.asarray(found), np.asarray(value)), key
  ours = read_gguf(written)
  for tensor in reader.tensors:
    shape = tuple(int(x) for x in tensor.shape)[::-1]
    assert shape == ours.tensors[tensor.name].shape
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(values.reshape(shape), ours.values(tensor.name))
