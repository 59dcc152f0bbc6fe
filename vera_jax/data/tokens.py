"""Texts to token ids, stored ragged: one flat array and offsets.

Tokens are made once and cached. The name of a cache file is a hash of
everything that decides its content, so a cached file is never out of date.
"""

import hashlib
import json
import logging
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from vera_jax.data.cache import write_cache
from vera_jax.data.examples import Examples
from vera_jax.data.tokenizer import (
  FolderTokenizer,
  TokenizerInfo,
  tokenizer_info,
)

log = logging.getLogger(__name__)

_CHUNK = 4096  # texts tokenised at a time, which bounds the memory
_VERSION = b"vera_jax tokens 2"  # of the stored form: part of the file's name
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
    tokenizer: a fast tokenizer of transformers, or a `FolderTokenizer`, which
      is loaded only if the cache has no tokens.
    max_length: longer examples are cut; of a pair the longer text first.
    cache_dir: folder of the cache files, made when missing; None for none.
  """
  if isinstance(tokenizer, FolderTokenizer):
    info = tokenizer.info
  else:
    info = tokenizer_info(tokenizer)
  fingerprint = _fingerprint(examples, info, max_length)
  path = cache_dir and Path(cache_dir) / f"{fingerprint}.npz"
  arrays = _load(path, len(examples)) if path else None
  if arrays is None:
    made = arrays = _encode(examples, tokenizer, max_length)
    if path:
      write_cache(path, lambda file: np.savez(file, allow_pickle=False, **made))
  return Tokens(
    ids=arrays["ids"],
    offsets=arrays["offsets"],
    token_types=arrays["token_types"],
    labels=examples.labels,
    index=examples.index,
    truncated=int(arrays["truncated"]),
    pad_id=info.pad_id,
    fingerprint=fingerprint,
  )


def _encode(
  examples: Examples, tokenizer: Any, max_length: int
) -> dict[str, np.ndarray]:
  ids: list[list[int]] = []
  types: list[list[int]] = []
  truncated = 0
  for start in range(0, len(examples), _CHUNK):
    chunk = slice(start, start + _CHUNK)
    encoded = tokenizer(
      examples.first[chunk],
      examples.second[chunk] if examples.second else None,
      truncation="longest_first",
      max_length=max_length,
      padding=False,
    )
    ids += encoded["input_ids"]
    # RoBERTa's tokenizer gives no types: its model has only one.
    types += encoded.get("token_type_ids") or [
      [0] * len(row) for row in encoded["input_ids"]
    ]
    truncated += sum(bool(text.overflowing) for text in encoded.encodings)
  return {
    "ids": np.fromiter(chain.from_iterable(ids), np.int32),
    "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
    "token_types": np.fromiter(chain.from_iterable(types), np.int32),
    "truncated": np.array(truncated),
  }


def _fingerprint(
  examples: Examples, info: TokenizerInfo, max_length: int
) -> str:
  labels = examples.labels
  parts = [
    json.dumps([max_length, *info]).encode(),
    b"none" if labels is None else labels.tobytes(),
    str(len(examples)).encode(),
  ]
  texts = chain(examples.first, examples.second or [])
  digest = hashlib.sha256(_VERSION)
  for part in chain(parts, (t.encode("utf-8", "surrogatepass") for t in texts)):
    # The length before each part keeps "ab", "c" apart from "a", "bc".
    digest.update(len(part).to_bytes(8, "little") + part)
  return digest.hexdigest()


def _load(path: Path, examples: int) -> dict[str, np.ndarray] | None:
  """The cached arrays; None for a missing file and for a damaged one."""
  if not path.is_file():
    return None
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    ids, types = arrays["ids"], arrays["token_types"]
    offsets = arrays["offsets"]
    if (
      offsets.shape == (examples + 1,)
      and ids.shape == types.shape == (offsets[-1],)
      and ids.dtype == types.dtype == np.int32
      and offsets.dtype == np.int64
      and arrays["truncated"].shape == ()
    ):
      return arrays
  except _UNREADABLE as error:
    log.warning("%s is damaged (%s): made again.", path, error)
  return None
