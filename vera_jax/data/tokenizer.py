"""Tokenizers from a folder in Hugging Face's layout; nothing is downloaded."""

import hashlib
import json
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.data.cache import keep
from vera_jax.errors import UserError

# What decides how a folder's tokenizer splits texts.
_FILES = ("*token*.json", "vocab.*", "merges.txt", "config.json")


class Facts(NamedTuple):
  """What is to be known of a tokenizer where all tokens are cached.

  Attributes:
    state: sha256 of all that decides its token ids.
    pad_id: its padding id.
  """

  state: str
  pad_id: int


def facts_of(tokenizer: Any) -> Facts:
  """The facts of a fast tokenizer of transformers."""
  state = json.loads(tokenizer.backend_tokenizer.to_str())
  # these two are settings of the last call, not of the tokenizer
  state.pop("truncation", None)
  state.pop("padding", None)
  names = list(tokenizer.model_input_names)
  text = json.dumps([state, names], sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return Facts(digest, int(tokenizer.pad_token_id))


class FolderTokenizer:
  """A folder's tokenizer, loaded only when there is something to tokenise.

  transformers takes seconds to import. Facts are kept beside the tokens, in a
  file named after the tokenizer's files and the library's versions.
  """

  def __init__(self, folder: str | Path, cache_dir: Path) -> None:
    self._folder, self._cache = Path(folder).expanduser(), cache_dir

  @cached_property
  def loaded(self) -> Any:
    return load_tokenizer(self._folder)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.loaded(*args, **kwargs)

  @cached_property
  def facts(self) -> Facts:
    path = self._cache / f"tokenizer-{self._files()}.json"
    try:
      state, pad_id = json.loads(path.read_text(encoding="utf-8"))
      return Facts(str(state), int(pad_id))
    except (OSError, ValueError, TypeError):  # not there, or damaged
      facts = facts_of(self.loaded)
      keep(path, lambda file: file.write(json.dumps(facts).encode()))
      return facts

  def _files(self) -> str:
    """sha256 over names and bytes of the tokenizer's files."""
    versions = [version(name) for name in ("transformers", "tokenizers")]
    sha = hashlib.sha256(json.dumps(versions).encode())
    files = {file for name in _FILES for file in self._folder.glob(name)}
    for file in sorted(files):
      content = hashlib.sha256(file.read_bytes()).hexdigest()
      sha.update(f"{file.name} {content}\n".encode())
    return sha.hexdigest()


def load_tokenizer(folder: str | Path) -> Any:
  """The fast tokenizer of a folder in Hugging Face's layout.

  `tokenizer.json` alone is enough. A folder with only a vocabulary (vocab.txt,
  or vocab.json and merges.txt) is read as its config.json says, or without
  one as BERT or RoBERTa.
  """
  folder = Path(folder).expanduser()
  kind = _tokenizer_files(folder)
  import transformers

  bare = not any(
    (folder / name).is_file()
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json")
  )
  loader = getattr(transformers, kind if bare else "AutoTokenizer")
  try:
    tokenizer = loader.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # `tokenizers` raises Exception itself
    reason = f"{folder}: the tokenizer can't be read: {error}"
    raise UserError(reason) from error
  if not tokenizer.is_fast or tokenizer.pad_token_id is None:
    raise UserError(
      f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer with a "
      "padding token."
    )
  return tokenizer


def _tokenizer_files(folder: Path) -> str:
  """Checks them, for transformers makes an empty vocabulary without."""

  def has(*names: str) -> bool:
    return all((folder / name).is_file() for name in names)

  if has("vocab.json", "merges.txt"):
    return "RobertaTokenizer"
  if has("vocab.txt"):
    return "BertTokenizer"
  if has("tokenizer.json"):
    return "AutoTokenizer"
  raise UserError(
    f"{folder} holds no tokenizer: tokenizer.json is needed, or vocab.txt, "
    "or vocab.json and merges.txt."
  )
