"""A tokenizer's files, looked at before a library reads them.

A tokenizer.json is a small program: its normalizer replaces texts by others, in
as many steps as it likes. Forty steps that write "aa" for "a" make a terabyte
of one letter. So what a text could become is counted first.
"""

import base64
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.files import JSON, check_file, read_json

# What transformers may open in a folder.
PATTERNS = (
  "config.json",
  "*token*.json",
  "vocab.*",
  "merges.txt",
  "*.model",
  "*.tiktoken",
  "tekken.json",
  "chat_template.*",
  "additional_chat_templates/*",
)
# Characters, and how many times as many a text of so many may become. What
# T5 and ALBERT have makes eighteen of one, at most, and of few.
TEXT, GROWTH = 1000, 64
ADDED = 1000  # tokens that a file may put around a text
PADDED = 100_000  # tokens that it may fill each text up to
IDS = 2**24  # tokens; libraries go through all numbers up to the largest one


def check_tokenizer(folder: Path) -> None:
  """Refuse files that lead elsewhere, or would make too much of a text.

  Raises:
    UserError: for one of them; the message names it.
  """
  for pattern in PATTERNS:
    for file in sorted(folder.glob(pattern)):
      check_file(file, inside=folder, limit=JSON)
  if (file := folder / "tokenizer_config.json").is_file():
    for path in _named_files(read_json(file)):
      for named in (Path(path), folder / path):
        if os.path.lexists(named):
          check_file(named, inside=folder, limit=JSON)
  checks = {
    "tokenizer.json": _check_growth,
    "vocab.json": _check_ids,
    "added_tokens.json": _check_ids,
  }
  for name, check in checks.items():
    if not (file := folder / name).is_file():
      continue
    fields = read_json(file)
    try:
      check(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      reason = f"{type(error).__name__} {error}"
      raise UserError(f"{file} is no tokenizer's: {reason}.") from error
    except UserError as error:
      raise UserError(f"{file} is not used: {error}.") from error


def _named_files(fields: Mapping[str, Any]) -> Iterator[str]:
  """The files that a tokenizer_config.json names, which transformers opens."""
  for name, value in fields.items():
    if name.endswith(("_file", "_files")):
      paths = value if isinstance(value, list) else [value]
      yield from (path for path in paths if isinstance(path, str))


def _check_ids(vocabulary: Mapping[str, Any]) -> None:
  for token, i in vocabulary.items():
    if isinstance(i, int) and i >= IDS:
      raise UserError(
        f"its token {token!r} has the number {i:,}, and there are {IDS:,} at"
        " most"
      )


def _check_growth(fields: Mapping[str, Any]) -> None:
  if isinstance(vocabulary := fields.get("model", {}).get("vocab"), Mapping):
    _check_ids(vocabulary)
  _check_ids({x["content"]: x["id"] for x in fields.get("added_tokens") or ()})
  for name in ("normalizer", "pre_tokenizer", "decoder"):
    size = float(TEXT)
    for step in _steps(fields.get(name)):
      factor, more = _growth(step)
      size = size * factor + more
      if size > TEXT * GROWTH:
        raise UserError(
          f"its {name} would make more than {GROWTH} times as much of a text"
        )
  added = sum(_added(step) for step in _steps(fields.get("post_processor")))
  if added > ADDED:
    raise UserError(
      f"its post_processor would put {added:,} tokens around a text, or repeat"
      " the text itself"
    )
  strategy = (fields.get("padding") or {}).get("strategy")
  if isinstance(strategy, Mapping) and not strategy.get("Fixed", 0) <= PADDED:
    raise UserError(
      f"its padding would fill each text up to {strategy['Fixed']:,} tokens"
    )


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
  """The parts of a part, one after the other."""
  if part is None:
    return
  for name in ("normalizers", "pretokenizers", "decoders", "processors"):
    if part["type"] == "Sequence" and name in part:
      for step in part[name]:
        yield from _steps(step)
      return
  yield part


def _growth(step: Mapping[str, Any]) -> tuple[float, float]:
  """(characters that a step makes of one, how many it adds to a text)."""
  kind = step["type"]
  if kind == "Replace":
    pattern, written = step["pattern"], len(step["content"])
    if "String" not in pattern:  # a regular expression may match nothing
      return 1 + written if written > 1 else max(1, written), written
    if not pattern["String"]:
      raise UserError("it replaces what is empty")
    return max(1, written / len(pattern["String"])), 0
  if kind == "Prepend":
    return 1, len(step["prepend"])
  if kind == "ByteLevel":  # a character per byte
    return 2, 1
  if kind == "Precompiled":
    return _longest(step["precompiled_charsmap"]), 0
  return 1, 0


def _longest(charsmap: str | None) -> float:
  """The most characters that sentencepiece's table has for one."""
  data = base64.b64decode(charsmap or "")
  if len(data) < 4:
    return 1
  (size,) = struct.unpack_from("<I", data)
  texts = data[4 + size :].split(b"\0")
  return max(1, *(len(text.decode("utf-8", "replace")) for text in texts))


def _added(step: Mapping[str, Any]) -> int:
  """Tokens that a step puts around a text; a repeated text counts as a lot."""
  if step["type"] != "TemplateProcessing":
    return 0
  sizes = {k: len(x["ids"]) for k, x in step["special_tokens"].items()}
  added = 0
  for name in ("single", "pair"):
    for piece in step[name]:
      special = piece.get("SpecialToken")
      added += sizes[special["id"]] if special else 0
    sequences = [piece for piece in step[name] if "Sequence" in piece]
    added += ADDED * max(0, len(sequences) - 2)
  return added
