"""Texts to token ids, stored ragged: one flat array and offsets.

Tokens are made once and cached. The name of a cache file is a hash of
everything that decides its content, so a cached file is never out of date.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64
from ml_collections import ConfigDict
from safetensors.numpy import load, save

from vera_jax.data.answers import COUNTS, Answers, encode_answers
from vera_jax.data.completions import Completions, encode_completions
from vera_jax.data.examples import Examples, subset
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.files import (
  DATA,
  JSON,
  parse_json,
  read_bytes,
  say_uncached,
  write_file,
)
from vera_jax.places import local_copy, place

log = logging.getLogger(__name__)

_CHUNK = 4096  # texts tokenised at a time, which bounds the memory
_VERSION = b"vera_jax tokens 2"  # of the stored form: part of the file's name
# The files of a folder that decide how its tokenizer splits texts.
_TOKENIZER_FILES = (
  "*token*.json",
  "vocab.*",
  "merges.txt",
  "config.json",
  "chat_template.jinja",
)


@dataclass(frozen=True)
class Tokens:
  """The token ids of one split.

  Text i is `ids[offsets[i]:offsets[i + 1]]`, special tokens included. An
  example is one text, or those of its `choices`, which follow one another.

  Attributes:
    labels, index, choices: as in `Examples`; for texts given as words, labels
      [tokens] with the class of the word that begins at a token, 0 elsewhere.
    words: for such texts, [tokens] the number in its text of the word that
      begins at a token; -1 for further parts of it and special tokens.
    learned: where the words themselves are learned, bool [tokens]: which tokens
      are, each from those of its text before it.
    truncated: how many texts were cut to `max_length`.
    left_out: the `index` of examples of which the cut left nothing to learn;
      they are not among the others.
    places: the file and line of examples by their `index`, as far as they are
      known; also of those that are left out.
    counts: how many texts each of `answers.COUNTS` is true of.
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
  choices: int = 1
  words: Int32[np.ndarray, " tokens"] | None = None
  learned: Bool[np.ndarray, " tokens"] | None = None
  left_out: tuple[int, ...] = ()
  places: dict[int, str] = field(default_factory=dict)
  counts: dict[str, int] = field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.text_lengths) // self.choices

  def place(self, index: int) -> str:
    """Where the example of this index is, for messages."""
    return self.places.get(index, f"row {index + 1}")

  @cached_property
  def text_lengths(self) -> Int64[np.ndarray, " texts"]:
    return np.diff(self.offsets)

  @cached_property
  def lengths(self) -> Int64[np.ndarray, " examples"]:
    """Tokens of each example, all its choices together."""
    return np.diff(self.offsets[:: self.choices])

  @cached_property
  def reads(self) -> Int64[np.ndarray, " examples"] | None:
    """Learned tokens of each example, where words are learned."""
    if self.learned is None:
      return None
    before = np.concatenate([[0], np.cumsum(self.learned, dtype=np.int64)])
    return np.diff(before[self.offsets[:: self.choices]])


class TokenizerInfo(NamedTuple):
  """All that must be known of a tokenizer to use tokens from the cache.

  Attributes:
    checksum: the sha256 of everything that decides its token ids.
    pad_id: its padding id.
    bos_id, eos_id: those of the tokens that begin and end a text, if it names
      some.
    template: sha256 of its chat template and the words for that; "" if it has
      none.
  """

  checksum: str
  pad_id: int
  bos_id: int | None = None
  eos_id: int | None = None
  template: str = ""


class FolderTokenizer:
  """A folder's tokenizer, loaded only when there is something to tokenise.

  transformers takes seconds to import, which a run whose tokens are all cached
  can save. So `info` is cached beside the tokens, in a file named after the
  tokenizer's files and the versions of the libraries.
  """

  def __init__(self, folder: str | Path, cache_dir: Path) -> None:
    self._folder, self._cache = local_copy(folder), cache_dir

  @cached_property
  def loaded(self) -> Any:
    return load_tokenizer(self._folder)

  @cached_property
  def info(self) -> TokenizerInfo:
    versions = [version(name) for name in ("transformers", "tokenizers")]
    key = hashlib.sha256(json.dumps(versions).encode())
    files = {f for n in _TOKENIZER_FILES for f in self._folder.glob(n)}
    for file in sorted(files):
      data = read_bytes(file, inside=self._folder, limit=JSON)
      content = hashlib.sha256(data).hexdigest()
      key.update(f"{file.name} {content}\n".encode())
    path = self._cache / f"tokenizer-{key.hexdigest()}.json"
    try:
      stored = parse_json(read_bytes(path, inside=self._cache, limit=JSON))
      checksum, pad_id, bos, eos, template = stored
      bos, eos = (None if i is None else int(i) for i in (bos, eos))
      return TokenizerInfo(str(checksum), int(pad_id), bos, eos, str(template))
    except (UserError, ValueError, TypeError):  # missing or damaged
      info = _info(self.loaded)
      _write_cache(path, json.dumps(info).encode())
      return info


def load_tokens(
  read_split: Callable[[str, str], Examples],
  splits: Sequence[str],
  *,
  data: ConfigDict,
  folder: Path,
  completions: Completions | Answers | None = None,
) -> dict[str, Tokens]:
  """Splits, read, cut to size and tokenised, or from the cache.

  Args:
    read_split: (data.source, split) -> its examples.
    splits: the splits to read, of which "train" is cut to
      data.max_train_examples.
    data: config.data.
    folder: the tokenizer's folder.
    completions: see `tokenise`.

  Raises:
    UserError: as for `subset` and `tokenise`, and by `read_split`.
  """
  cache = place(data.cache_dir or "~/.cache/vera_jax/tokens")
  tokenizer = FolderTokenizer(folder, cache)
  tokens = {}
  for split in splits:
    examples = read_split(data.source, split)
    if split == "train":
      examples = subset(examples, data.max_train_examples, data.subset_seed)
    tokens[split] = tokenise(
      examples, tokenizer, data.max_length, cache, completions=completions
    )
  return tokens


def tokenise(
  examples: Examples,
  tokenizer: Any,
  max_length: int,
  cache_dir: str | Path | None,
  *,
  completions: Completions | Answers | None = None,
) -> Tokens:
  """Token ids of a split, from the cache where it has them.

  Args:
    tokenizer: a fast tokenizer of transformers, or a `FolderTokenizer`, which
      is loaded only if the cache has no tokens.
    max_length: longer examples are cut; of a pair the longer text first.
    cache_dir: folder of the cache files, made when missing; None for none.
    completions: how the words themselves are learned; None where they are not.
  """
  if isinstance(tokenizer, FolderTokenizer):
    info = tokenizer.info
  else:
    info = _info(tokenizer)
  fingerprint = _fingerprint(examples, info, max_length, completions)
  path = cache_dir and place(cache_dir) / f"{fingerprint}.tokens"
  arrays = _read_arrays(path) if path else None
  if arrays is None:
    tokenizer = getattr(tokenizer, "loaded", tokenizer)
    if completions is None:
      arrays = _encode(examples, tokenizer, max_length)
    elif isinstance(completions, Answers):
      arrays = encode_answers(examples, tokenizer, max_length, completions)
    else:
      arrays = encode_completions(examples, tokenizer, max_length, completions)
    if path:
      stored = save(arrays)
      _write_cache(path, hashlib.sha256(stored).digest() + stored)
  labels, words = examples.labels, arrays.get("words")
  if isinstance(labels, list):
    assert words is not None  # tags are of words
    labels = _token_labels(labels, words, np.diff(arrays["offsets"]))
  tokens = Tokens(
    ids=arrays["ids"],
    offsets=arrays["offsets"],
    token_types=arrays["token_types"],
    labels=labels,
    index=examples.index,
    places=dict(
      zip(examples.index.tolist(), examples.places or [], strict=False)
    ),
    truncated=int(arrays["truncated"]),
    pad_id=info.pad_id,
    fingerprint=fingerprint,
    choices=examples.choices,
    words=words,
    learned=arrays.get("learned"),
    counts={name: int(arrays[name]) for name in COUNTS if name in arrays},
  )
  return _without_empty(tokens) if isinstance(completions, Answers) else tokens


def _without_empty(tokens: Tokens) -> Tokens:
  """Without the examples of which nothing is learned."""
  assert tokens.reads is not None and tokens.learned is not None
  kept = tokens.reads > 0
  if kept.all():
    return tokens
  of_token = np.repeat(kept, tokens.lengths)
  bounds = np.cumsum(tokens.lengths[kept])
  return replace(
    tokens,
    ids=tokens.ids[of_token],
    offsets=np.concatenate([[0], bounds]).astype(np.int64),
    token_types=tokens.token_types[of_token],
    learned=tokens.learned[of_token],
    index=tokens.index[kept],
    left_out=tuple(tokens.index[~kept].tolist()),
  )


def _token_labels(
  labels: list[np.ndarray],
  words: Int32[np.ndarray, " tokens"],
  lengths: Int64[np.ndarray, " examples"],
) -> Int32[np.ndarray, " tokens"]:
  """The class of each word, at the token that it begins with."""
  before = np.cumsum([0, *map(len, labels)][:-1])  # words of earlier texts
  number = words + np.repeat(before, lengths)
  flat = np.concatenate(labels).astype(np.int32)
  return np.where(words >= 0, flat[number], 0).astype(np.int32)


def _info(tokenizer: Any) -> TokenizerInfo:
  """Digest and padding id of a fast tokenizer of transformers."""
  state = json.loads(tokenizer.backend_tokenizer.to_str())
  # These two are settings of the last call, not of the tokenizer.
  state.pop("truncation", None)
  state.pop("padding", None)
  names = list(tokenizer.model_input_names)
  text = json.dumps([state, names], sort_keys=True)
  checksum = hashlib.sha256(text.encode()).hexdigest()
  ends = tokenizer.bos_token_id, tokenizer.eos_token_id
  template = ""
  if tokenizer.chat_template is not None:
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map]
    text = json.dumps(parts, sort_keys=True, default=str)
    template = hashlib.sha256(text.encode()).hexdigest()
  pad_id = int(tokenizer.pad_token_id)
  return TokenizerInfo(checksum, pad_id, *ends, template)


def _encode(
  examples: Examples, tokenizer: Any, max_length: int
) -> dict[str, np.ndarray]:
  ids: list[list[int]] = []
  types: list[list[int]] = []
  words: list[int] = []
  truncated = 0
  # below the special tokens, the tokenizer would cut nothing at all
  special = tokenizer.num_special_tokens_to_add(pair=bool(examples.second))
  least = special + (2 if examples.second else 1)
  if len(examples) and max_length < least:
    raise UserError(
      f"max_length is {max_length}, but {special} tokens of each example are"
      f" special ones: at least {least} are needed."
    )
  are_words = _are_words(examples)
  for start in range(0, len(examples.first), _CHUNK):
    chunk = slice(start, start + _CHUNK)
    first = examples.first[chunk]
    encoded = tokenizer(
      [" ".join(text) for text in first] if are_words else first,
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
    if are_words:
      for text, encoding in zip(first, encoded.encodings, strict=True):
        words += _beginnings(text, encoding.offsets)
  arrays: dict[str, np.ndarray] = {
    "ids": np.fromiter(chain.from_iterable(ids), np.int32),
    "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
    "token_types": np.fromiter(chain.from_iterable(types), np.int32),
    "truncated": np.array(truncated),
  }
  return arrays | ({"words": np.array(words, np.int32)} if are_words else {})


def _are_words(examples: Examples) -> bool:
  """Whether the texts are given as lists of words."""
  return bool(examples.first) and not isinstance(examples.first[0], str)


def _beginnings(
  words: list[str], offsets: list[tuple[int, int]]
) -> Iterator[int]:
  """For each token the number of the word that begins with it, or -1.

  `offsets` are the tokens' characters in the words joined by spaces. A token's
  last character counts, since some tokenizers put the space before a word into
  the word's first token.
  """
  of_character: list[int] = []
  for number, word in enumerate(words):
    of_character += [number] * len(word) + [-1]
  last = -1
  for start, end in offsets:
    here = of_character[end - 1] if end > start else -1
    yield here if here > last else -1
    last = max(last, here)


def _fingerprint(
  examples: Examples,
  info: TokenizerInfo,
  max_length: int,
  completions: Completions | Answers | None,
) -> str:
  labels = examples.labels
  if isinstance(labels, list):
    labels = np.concatenate(labels)
  settings: list[Any] = [max_length, info.checksum, info.pad_id]
  if completions is not None:
    settings += ["completions", *completions, info.bos_id, info.eos_id]
    settings.append(examples.second is not None)
  if isinstance(completions, Answers):
    settings += ["answers 2", info.template]  # the number of their form
  if examples.choices > 1:  # pairs hash as they did before there were choices
    settings.append(examples.choices)
  parts = [
    json.dumps(settings).encode(),
    b"none" if labels is None else labels.tobytes(),
    str(len(examples)).encode(),
  ]
  texts: Iterator[str] = chain(examples.first, examples.second or [])
  if _are_words(examples):
    parts.append(b"words")
    texts = map(json.dumps, examples.first)
  sha = hashlib.sha256(_VERSION)
  for part in chain(parts, (t.encode("utf-8", "surrogatepass") for t in texts)):
    # The length before each part keeps "ab", "c" apart from "a", "bc".
    sha.update(len(part).to_bytes(8, "little") + part)
  return sha.hexdigest()


def _read_arrays(path: Path) -> dict[str, np.ndarray] | None:
  """The cached arrays; None for a missing file and for a damaged one.

  The file is a sha256 and what it is of, in the format of safetensors.
  """
  if not path.is_file():
    return None
  try:
    content = memoryview(read_bytes(path, inside=path.parent, limit=DATA))
    if hashlib.sha256(content[32:]).digest() != content[:32]:
      raise UserError("its checksum is another")
    return load(bytes(content[32:]))
  except UserError as error:
    log.warning("%s is damaged (%s): made again.", path, error)
    return None


def _write_cache(path: Path, content: bytes) -> None:
  """Writes the file whole, so that nobody reads half of it.

  A cache can be made again at any moment: if it can't be written, a warning is
  all that happens.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: file.write(content))
  except OSError as error:
    say_uncached(path.parent, error.strerror)
