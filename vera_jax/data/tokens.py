"""Texts to token ids, stored ragged: one flat array and offsets.

Made once: a cache file is named after everything that decides its content.
"""

import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from vera_jax.data.cache import keep
from vera_jax.data.examples import Examples
from vera_jax.data.tokenizer import (
  Facts,
  FolderTokenizer,
  facts_of,
  load_tokenizer,
)

__all__ = ["Tokens", "load_tokenizer", "tokenise"]

log = logging.getLogger(__name__)

_CHUNK = 4096  # texts tokenised at a time, which bounds the memory
_LAYOUT = b"vera_jax tokens 2"  # a change of the stored form changes it
_UNREADABLE = (
  OSError,
  ValueError,
  KeyError,
  EOFError,
  zipfile.BadZipFile,
  zlib.error,
)


@dataclass(frozen=True)
class Tokens:
  """The token ids of one split.

  Example i is `ids[offsets[i]:offsets[i + 1]]`, special tokens included.

  Attributes:
    labels, index: as in `Examples`.
    truncated: how many examples were cut to `max_length`.
    pad_id: the tokenizer's padding id.
    fingerprint: sha256 over texts, labels, tokenizer and `max_length`.
  """

  ids: Int32[np.ndarray, " tokens"]
  offsets: Int64[np.ndarray, " bounds"]
  token_types: Int32[np.ndarray, " tokens"]
  labels: np.ndarray | None
  index: np.ndarray
  truncated: int
  pad_id: int
  fingerprint: str

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @cached_property
  def lengths(self) -> Int64[np.ndarray, " examples"]:
    return np.diff(self.offsets)


def tokenise(
  examples: Examples,
  tokenizer: Any,
  max_length: int,
  cache_dir: str | Path | None,
) -> Tokens:
  """Token ids of a split, from the cache where it has them.

  Args:
    tokenizer: a fast tokenizer of transformers, or a folder's, which is then
      loaded only where the cache has no tokens.
    max_length: longer examples are cut; of a pair the longer text first.
    cache_dir: folder of the cache files, made when missing; None for none.
  """
  folders = isinstance(tokenizer, FolderTokenizer)
  facts = tokenizer.facts if folders else facts_of(tokenizer)
  fingerprint = _fingerprint(examples, facts, max_length)
  path = cache_dir and Path(cache_dir) / f"{fingerprint}.npz"
  arrays = _load(path, len(examples)) if path else None
  if arrays is None:
    arrays = _encode(examples, tokenizer, max_length)
    if path:
      _save(path, arrays)
  return Tokens(
    ids=arrays["ids"],
    offsets=arrays["offsets"],
    token_types=arrays["token_types"],
    labels=examples.labels,
    index=examples.index,
    truncated=int(arrays["truncated"]),
    pad_id=facts.pad_id,
    fingerprint=fingerprint,
  )


def _encode(
  examples: Examples, tokenizer: Any, max_length: int
) -> dict[str, np.ndarray]:
  ids: list[list[int]] = []
  types: list[list[int]] = []
  truncated = 0
  for start in range(0, len(examples), _CHUNK):
    part = slice(start, start + _CHUNK)
    encoded = tokenizer(
      examples.first[part],
      examples.second[part] if examples.second else None,
      truncation="longest_first",
      max_length=max_length,
      padding=False,
    )
    ids += encoded["input_ids"]
    types += encoded.get("token_type_ids") or [
      [0] * len(row) for row in encoded["input_ids"]
    ]
    truncated += sum(bool(text.overflowing) for text in encoded.encodings)
  lengths = [len(row) for row in ids]
  return {
    "ids": _flat(ids, sum(lengths)),
    "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    "token_types": _flat(types, sum(lengths)),
    "truncated": np.array(truncated),
  }


def _flat(rows: list[list[int]], count: int) -> np.ndarray:
  return np.fromiter((i for row in rows for i in row), np.int32, count)


def _fingerprint(examples: Examples, facts: Facts, max_length: int) -> str:
  digest = hashlib.sha256(_LAYOUT)
  for part in _parts(examples, facts, max_length):
    digest.update(len(part).to_bytes(8, "little") + part)
  return digest.hexdigest()


def _parts(
  examples: Examples, facts: Facts, max_length: int
) -> Iterable[bytes]:
  """What decides the result, as bytes; each is hashed with its length."""
  yield json.dumps([max_length, *facts]).encode()
  yield b"none" if examples.labels is None else examples.labels.tobytes()
  yield str(len(examples)).encode()
  for texts in (examples.first, examples.second or []):
    for text in texts:
      yield text.encode("utf-8", "surrogatepass")


def _load(path: Path, examples: int) -> dict[str, np.ndarray] | None:
  """The cached arrays; None for a missing file and for a damaged one."""
  if not path.is_file():
    return None
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    if _sound(arrays, examples):
      return arrays
  except _UNREADABLE as error:
    log.warning("%s is damaged (%s): made again.", path, error)
  return None


def _sound(arrays: dict[str, np.ndarray], examples: int) -> bool:
  ids, types = arrays["ids"], arrays["token_types"]
  return (
    arrays["offsets"].shape == (examples + 1,)
    and ids.shape == types.shape == (arrays["offsets"][-1],)
    and ids.dtype == types.dtype == np.int32
    and arrays["offsets"].dtype == np.int64
    and arrays["truncated"].shape == ()
  )


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
  keep(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
