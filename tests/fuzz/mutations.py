"""One change to one file, drawn by a seed: of bits, place or meaning.

`harm` draws a file and what happens to it: its bytes change, what stands at its
name is something else (a link to a file outside, a device, a FIFO), or, where
the format is known, a value in it does: of JSON, of a header, of an archive.
"""

import gzip
import io
import json
import os
import random
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEVICE = "/dev/random"  # without an end, and nobody else opens it
SECRET = "secret"  # a file's name outside
NUMBERS = (0, 1, 2, 3, 2**15, 2**31 - 1, 2**31, 10**9, 2**32 - 1, 2**63)
# What json.dumps can't write, by a text that it takes the place of.
DEEP, LONG = "many brackets", "many digits"
RAW = {DEEP: "[" * 20_000 + "]" * 20_000, LONG: "9" * 5000}
VALUES: tuple[Any, ...] = (
  *(None, True, False, "", "x", [], {}, [0], [[]], {"a": 1}, [None, "x", 1.5]),
  *(-1, *NUMBERS, -(2**63), 10**30, LONG),
  *(0.0, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf")),
  *("None", "1e9", "\ud800", "\x1b]0;x\x07\x00\r\n", "ß" * 300, "a" * 10**6),
  *(DEEP, f"../outside/{SECRET}", "/etc/passwd", DEVICE, "..", "/", "~root"),
)
TEXTS = (
  *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"\t" * 5000),
  *(b"," * 70_000, b"\n" * 3000, b"\r", b"a" * 10**6, b"\x1b[2J", b"{", b"["),
  *(b"[" * 20_000, b'{"a":' * 20_000, b"\xe2\x80\xa8", b"1e400", b"-"),
)
# Parts of chat templates: what they may not do, what has no end, or no sense.
PIECES = r"""
{% include '/etc/passwd' %}
{% import 'os' as os %}
{{ cycler.__init__.__globals__.os.system('true') }}
{{ messages.__class__.__mro__ }}
{{ messages[9].content.x.y }}
{{ messages | tojson }}
{{ messages.pop() }}
{% set messages = 1 %}
{{ self }}
{{ 1 / 0 }}
{{ 9 ** 9 ** 9 }}
{{ 'x' * 10**10 }}
{{ 'x' | indent(10**9) }}
{{ range(10**10) | list }}
{% for i in range(10**9) %}x{% endfor %}
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{{ raise_exception('no') }}
{{ strftime_now('%Y' * 999) }}
{{ '\x1b]0;x\x07' * 999 }}
{{ '\ud800' }}
{% generation %}
{% endgeneration %}
{% break %}
{% raw %}
{% if %}
{{
%}
{#
""".strip().splitlines()
# What stands in the place of a file: starts of formats that run or expand.
OTHERS = (
  b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\nshowpage\n",
  *(b"\x80\x04\x95", b"GGUF" + b"\xff" * 60, b"#!/bin/sh\n", b"\x7fELF"),
  *(b"PK\x03\x04", b"PAR1" + b"\0" * 8 + b"PAR1", b"\x89HDF\r\n\x1a\n"),
  struct.pack("<Q", 2**62) + b"{}",
  b"",
)
Rng = random.Random


def harm(folder: Path, pattern: str, rng: Rng, outside: Path) -> str:
  """Change one of the files that a pattern matches; returns what was done."""
  files = sorted(path for path in folder.glob(pattern) if path.is_file())
  file = rng.choice(files)
  name, data = file.relative_to(folder), file.read_bytes()
  inside = FORMATS.get(file.suffix)
  if inside is None and data[:1] == b"{":
    inside = _json
  draw = rng.random()
  if draw < 0.12:
    return f"{name}: {_put(file, rng, outside)}"
  if inside is not None and draw < 0.65:
    data = inside(data, rng)
    what = f"a value inside of its {file.suffix}"
  else:
    what, data = _bytes(data, rng)
  file.write_bytes(data)
  return f"{name}: {what}"


def _put(file: Path, rng: Rng, outside: Path) -> str:
  """Something else at a file's name."""
  what = rng.choice(("link", "link", "device", "fifo", "folder", "nothing"))
  if what == "link":  # to a file that would do
    shutil.copy(file, outside / SECRET)
  file.unlink()
  if what == "link":
    file.symlink_to(outside / SECRET)
  elif what == "device":
    file.symlink_to(DEVICE)
  elif what == "fifo":
    os.mkfifo(file)
  elif what == "folder":
    file.mkdir()
  return f"{what} in its place"


def _bytes(data: bytes, rng: Rng) -> tuple[str, bytes]:
  """(what was done, the bytes after it); most places are near an end."""
  near = rng.choice((64, 1024, len(data)))
  at = rng.randrange(min(near, len(data)) + 1)
  at = len(data) - at if rng.random() < 0.25 else at
  size = min(rng.choice((1, 4, 8, 30, 1000)), len(data) - at)
  before, block, after = data[:at], data[at : at + size], data[at + size :]
  what = rng.choice(
    ("flip", "number", "number", "cut", "drop", "double", "insert", "other")
  )
  if what == "flip":
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 30))):
      if changed:
        place = (at + rng.randrange(30)) % len(changed)
        changed[place] ^= 1 << rng.randrange(8)
    return f"bits flipped at {at}", bytes(changed)
  if what == "number":
    bytes_ = rng.choice((1, 2, 4, 8))
    number = rng.choice((*NUMBERS, -1)) % 256**bytes_
    order = rng.choice(("little", "little", "big"))
    written = number.to_bytes(bytes_, order)
    return f"{number} at {at}", before + written + data[at + bytes_ :]
  if what == "cut":
    return f"cut at {at}", before
  if what == "drop":
    return f"{size} bytes left out at {at}", before + after
  if what == "double":
    times = rng.choice((2, 3, 1000))
    return f"{size} bytes {times} times at {at}", before + block * times + after
  if what == "insert":
    text = rng.choice((*TEXTS, rng.randbytes(8)))
    return f"{text[:8]!r}… put in at {at}", before + text + block + after
  return "another format's bytes", rng.choice(OTHERS)


def _json(data: bytes, rng: Rng) -> bytes:
  """A value, key or entry somewhere in a JSON text changed."""
  try:
    root = [json.loads(data)]
  except ValueError:
    return _bytes(data, rng)[1]
  places = []  # of every value: what holds it, and where in that

  def walk(holder: Any) -> None:
    keys = holder if isinstance(holder, dict) else range(len(holder))
    for key in list(keys)[:300]:
      places.append((holder, key))
      if isinstance(holder[key], dict | list):
        walk(holder[key])

  walk(root)
  holder, key = rng.choice(places)
  what = rng.choice(("value", "value", "value", "near", "other", "keys"))
  if what == "value":
    holder[key] = rng.choice(VALUES)
  elif what == "near":
    holder[key] = _near(holder[key], rng)
  elif what == "other":
    there, word = rng.choice(places)
    holder[key] = json.loads(json.dumps(there[word]))
  elif isinstance(holder, list):
    holder[:] = rng.choice(([], holder * 2, holder[::-1], holder * 1000))
  elif rng.random() < 0.6:
    del holder[key]
  else:
    holder[str(rng.choice(VALUES))[:99]] = holder.pop(key)
  text = json.dumps(root[0] if root else None)
  for word, raw in RAW.items():
    text = text.replace(f'"{word}"', raw)
  return text.encode()


def _near(value: Any, rng: Rng) -> Any:
  """A value that isn't far from another."""
  if isinstance(value, bool) or value is None:
    return not value
  if isinstance(value, int | float):
    return rng.choice((value + 1, value - 1, -value, value * 2, float(value)))
  if isinstance(value, str):
    half = len(value) // 2
    return rng.choice(
      (value[:half], value * 2, value.upper(), f" {value}\n", [value])
    )
  return rng.choice(([value], {"x": value}, list(value), str(value)))


def _lines(data: bytes, rng: Rng) -> bytes:
  """One of JSON's lines changed."""
  lines = data.split(b"\n")
  number = rng.randrange(len(lines))
  lines[number] = _json(lines[number], rng)
  return b"\n".join(lines)


def _cells(data: bytes, rng: Rng) -> bytes:
  """A cell of a table changed, left out or added, its row's others kept."""
  lines = data.split(b"\n")
  number = rng.randrange(len(lines))
  apart = b"\t" if b"\t" in lines[0] else b","
  cells = lines[number].split(apart)
  at = rng.randrange(len(cells))
  value = str(rng.choice(VALUES)).encode("utf-8", "surrogatepass")
  what = rng.choice(("value", "value", "quoted", "drop", "double", "reverse"))
  if what == "value":
    cells[at] = value
  elif what == "quoted":
    cells[at] = b'"' + value.replace(b'"', b'""') + b'\n"'
  elif what == "drop":
    del cells[at]
  else:
    cells = cells + cells if what == "double" else cells[::-1]
  lines[number] = apart.join(cells)
  return b"\n".join(lines)


def _template(data: bytes, rng: Rng) -> bytes:
  """A part put into a chat template, or one of its own left out or moved."""
  parts = re.split(r"(?={[{%])|(?<=[%}]})", data.decode())
  at = rng.randrange(len(parts))
  what = rng.choice(("piece", "piece", "drop", "move"))
  if what == "piece":
    parts.insert(at, rng.choice(PIECES))
  else:
    moved = parts.pop(at)
    if what == "move":
      parts.insert(rng.randrange(len(parts) + 1), moved)
  return "".join(parts).encode()


def _gguf(data: bytes, rng: Rng) -> bytes:
  """A count, length, type, value, dimension or offset of the header changed, or
  one of its texts, with its length."""
  numbers, texts = [(4, 4)], []  # (where, how many bytes) of each
  at = 8

  def number(size: int) -> int:
    nonlocal at
    numbers.append((at, size))
    at += size
    return int.from_bytes(data[at - size : at], "little")

  def text() -> None:
    nonlocal at
    size = number(8)
    texts.append((at, size))
    at += size

  def value(kind: int) -> None:
    if kind == 8:
      text()
    elif kind == 9:
      inner, count = number(4), number(8)
      for _ in range(count):
        value(inner)
    else:
      number((1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)[kind])

  tensors, entries = number(8), number(8)
  for _ in range(entries):
    text()
    value(number(4))
  for _ in range(tensors):
    text()
    for _ in range(number(4)):
      number(8)
    number(4), number(8)
  if rng.random() < 0.3:
    where, size = rng.choice(texts)
    new = str(rng.choice(VALUES)).encode("utf-8", "surrogatepass")[:5000]
    new += b" " * ((size - len(new)) % 32)  # what is behind stays aligned
    length = len(new).to_bytes(8, "little")
    return data[: where - 8] + length + new + data[where + size :]
  where, size = rng.choice(numbers)
  old = int.from_bytes(data[where : where + size], "little")
  new_number = rng.choice((*NUMBERS, old + 1, old - 1, 2 * old, -1))
  written = (new_number % 256**size).to_bytes(size, "little")
  return data[:where] + written + data[where + size :]


def _safetensors(data: bytes, rng: Rng) -> bytes:
  """The header's JSON changed, its length right; or values that are none."""
  size = int.from_bytes(data[:8], "little")
  header, tensors = data[8 : 8 + size], data[8 + size :]
  if rng.random() < 0.2:
    at = rng.randrange(max(1, len(tensors) // 4)) * 4
    odd = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38)))
    return data[: 8 + size] + tensors[:at] + odd + tensors[at + 4 :]
  header = _json(header, rng)
  header += b" " * (-len(header) % 8)
  return len(header).to_bytes(8, "little") + header + tensors


def _gzip(data: bytes, rng: Rng) -> bytes:
  """Other content, compressed; or much more of it: 4 GB in as many MB."""
  if rng.random() < 0.05:
    return data + gzip.compress(bytes(2**27)) * 32
  return gzip.compress(_bytes(gzip.decompress(data), rng)[1])


def _png(data: bytes, rng: Rng) -> bytes:
  """Another size or kind of pixels in the header; or a whole picture, huge."""
  if rng.random() < 0.1:
    wide, tall = rng.choice(
      ((1, 60_000), (60_000, 1), (13_000, 13_000), (2_000_000, 40))
    )
    header = struct.pack(">IIBBBBB", wide, tall, 1, 0, 0, 0, 0)  # of one bit
    rows = zlib.compress(bytes((1 + -(-wide // 8)) * tall), 1)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return data[:8] + b"".join(_chunk(*chunk) for chunk in chunks)
  at = rng.choice((0, 0, 4, 4, 8, 9, 12))  # the header's fields
  size = 4 if at < 8 else 1
  number = rng.choice((*NUMBERS, 13_000, 60_000)) % 256**size
  header = data[16:29]
  header = header[:at] + number.to_bytes(size, "big") + header[at + size :]
  return data[:8] + _chunk(b"IHDR", header) + data[33:]


def _chunk(name: bytes, content: bytes) -> bytes:
  """A part of a PNG, its checksum right."""
  checksum = zlib.crc32(name + content)
  return (
    struct.pack(">I", len(content))
    + name
    + content
    + struct.pack(">I", checksum)
  )


def _zip(data: bytes, rng: Rng) -> bytes:
  """One of an archive's members changed, the checksums right."""
  with zipfile.ZipFile(io.BytesIO(data)) as old:
    names = old.namelist()
    contents = {name: old.read(name) for name in names}
  name = rng.choice(names)
  contents[name] = _bytes(contents[name], rng)[1]
  if rng.random() < 0.2:
    contents[rng.choice((name.upper(), "../x", "/x"))] = contents.pop(name)
  made = io.BytesIO()
  with zipfile.ZipFile(made, "w", rng.choice((0, 8))) as new:
    for name, content in contents.items():
      new.writestr(name, content)
  return made.getvalue()


def _parquet(data: bytes, rng: Rng) -> bytes:
  """A cell or the metadata of a Parquet file changed, or its rows endless."""
  import pyarrow
  from pyarrow import parquet

  table = parquet.read_table(io.BytesIO(data))
  metadata = table.schema.metadata or {}
  try:
    if rng.random() < 0.01:  # one row 20 million times, in some kB
      zeros = pyarrow.array(memoryview(bytes(20_000_000)))
      one = {
        name: table[name][:1].combine_chunks() for name in table.schema.names
      }
      table = pyarrow.table(
        {
          name: pyarrow.DictionaryArray.from_arrays(zeros, value)
          for name, value in one.items()
        }
      )
    elif metadata and rng.random() < 0.5:
      name = rng.choice(sorted(metadata))
      metadata = {**metadata, name: _json(metadata[name], rng)}
    else:
      rows = [_as_text(row) for row in table.to_pylist()]
      changed = json.loads(_json(json.dumps(rows).encode(), rng))
      table = pyarrow.Table.from_pylist([_as_bytes(row) for row in changed])
    made = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata(metadata), made)
    return made.getvalue()
  except (pyarrow.ArrowException, ValueError, TypeError, AttributeError):
    return _bytes(data, rng)[1]  # no table has such a value
  except (OverflowError, RecursionError, KeyError):
    return _bytes(data, rng)[1]


def _as_text(value: Any) -> Any:
  if isinstance(value, bytes):
    return f"bytes {value.hex()}"
  if isinstance(value, dict):
    return {key: _as_text(part) for key, part in value.items()}
  return value


def _as_bytes(value: Any) -> Any:
  if isinstance(value, str) and value.startswith("bytes "):
    return bytes.fromhex(value.removeprefix("bytes "))
  if isinstance(value, dict):
    return {key: _as_bytes(part) for key, part in value.items()}
  return value


FORMATS: dict[str, Callable[[bytes, Rng], bytes]] = {
  ".json": _json,
  ".jsonl": _lines,
  ".csv": _cells,
  ".tsv": _cells,
  ".jinja": _template,
  ".gguf": _gguf,
  ".safetensors": _safetensors,
  ".gz": _gzip,
  ".png": _png,
  ".npz": _zip,
  ".parquet": _parquet,
}
