"""Tokenizers from a folder in Hugging Face's layout; nothing is downloaded."""

import hashlib
import json
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.data.cache import write_cache
from vera_jax.errors import UserError

# The files of a folder that decide how its tokenizer splits texts.
_FILES = ("*token*.json", "vocab.*", "merges.txt", "config.json")


class TokenizerInfo(NamedTuple):
  """All that must be known of a tokenizer to use tokens from the cache.

  Attributes:
    digest: sha256 of everything that decides its token ids.
    pad_id: its padding id.
  """

  digest: str
  pad_id: int


def tokenizer_info(tokenizer: Any) -> TokenizerInfo:
  """Digest and padding id of a fast tokenizer of transformers."""
  state = json.loads(tokenizer.backend_tokenizer.to_str())
  # These two are settings of the last call, not of the tokenizer.
  state.pop("truncation", None)
  state.pop("padding", None)
  names = list(tokenizer.model_input_names)
  text = json.dumps([state, names], sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return TokenizerInfo(digest, int(tokenizer.pad_token_id))


class FolderTokenizer:
  """A folder's tokenizer, loaded only when there is something to tokenise.

  transformers takes seconds to import, which a run whose tokens are all cached
  can save. So `info` is cached beside the tokens, in a file named after the
  tokenizer's files and the versions of the libraries.
  """

  def __init__(self, folder: str | Path, cache_dir: Path) -> None:
    self._folder, self._cache = Path(folder).expanduser(), cache_dir

  @cached_property
  def loaded(self) -> Any:
    return load_tokenizer(self._folder)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.loaded(*args, **kwargs)

  @cached_property
  def info(self) -> TokenizerInfo:
    versions = [version(name) for name in ("transformers", "tokenizers")]
    key = hashlib.sha256(json.dumps(versions).encode())
    for file in sorted({f for name in _FILES for f in self._folder.glob(name)}):
      content = hashlib.sha256(file.read_bytes()).hexdigest()
      key.update(f"{file.name} {content}\n".encode())
    path = self._cache / f"tokenizer-{key.hexdigest()}.json"
    try:
      digest, pad_id = json.loads(path.read_text(encoding="utf-8"))
      return TokenizerInfo(str(digest), int(pad_id))
    except (OSError, ValueError, TypeError):  # missing or damaged
      info = tokenizer_info(self.loaded)
      write_cache(path, lambda file: file.write(json.dumps(info).encode()))
      return info


def load_tokenizer(folder: str | Path) -> Any:
  """The fast tokenizer of a folder in Hugging Face's layout.

  `tokenizer.json` alone is enough. A folder with only a vocabulary (vocab.txt,
  or vocab.json and merges.txt) is read as its config.json says, or without
  one as BERT or RoBERTa.

  Raises:
    UserError: the folder has no tokenizer, a damaged one, or one that is not
      fast or has no padding token.
  """
  folder = Path(folder).expanduser()

  def has(*names: str) -> bool:
    return all((folder / name).is_file() for name in names)

  # Checked here, since transformers makes an empty vocabulary without files.
  if has("vocab.json", "merges.txt"):
    by_vocabulary = "RobertaTokenizer"
  elif has("vocab.txt"):
    by_vocabulary = "BertTokenizer"
  elif has("tokenizer.json"):
    by_vocabulary = "AutoTokenizer"
  else:
    raise UserError(
      f"{folder} holds no tokenizer: tokenizer.json is needed, or vocab.txt, "
      "or vocab.json and merges.txt."
    )
  configs = ("config.json", "tokenizer_config.json", "tokenizer.json")
  import transformers  # takes seconds, so not before it is needed

  name = "AutoTokenizer" if any(map(has, configs)) else by_vocabulary
  try:
    tokenizer = getattr(transformers, name).from_pretrained(
      str(folder), local_files_only=True
    )
  except Exception as error:  # `tokenizers` raises Exception itself
    reason = f"{folder}: the tokenizer can't be read: {error}"
    raise UserError(reason) from error
  if not tokenizer.is_fast or tokenizer.pad_token_id is None:
    raise UserError(
      f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer with a "
      "padding token."
    )
  return tokenizer
