"""Tokenizers from a folder in Hugging Face's layout; nothing is downloaded."""

from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.imports import transformers
from vera_jax.models.family import FAMILIES, family_of
from vera_jax.models.tokenizer_files import check_tokenizer
from vera_jax.places import local_copy


def load_tokenizer(folder: str | Path) -> Any:
  """The fast tokenizer of a folder in Hugging Face's layout.

  `tokenizer.json` alone is enough. A folder with only a vocabulary (vocab.txt,
  or vocab.json and merges.txt) is read as its config.json says, or without
  one as BERT or RoBERTa.

  Raises:
    UserError: the folder has no tokenizer, a damaged one, or one that is not
      fast, has no padding token, or none for words that it doesn't know.
  """
  folder = local_copy(folder)

  def has(*names: str) -> bool:
    return all((folder / name).is_file() for name in names)

  check_tokenizer(folder)
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
  name = "AutoTokenizer" if any(map(has, configs)) else by_vocabulary
  if _is_own(folder):  # AutoTokenizer would warn of a config it can't place
    name = "PreTrainedTokenizerFast"
  library = transformers()  # its errors are not the tokenizer's
  try:
    tokenizer = getattr(library, name).from_pretrained(
      str(folder), local_files_only=True, trust_remote_code=False
    )
    # Some damaged ones panic only here, and one without a token for what it
    # doesn't know would fail at the first such word of a text.
    tokenizer("A few words 𓀀")
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # `tokenizers` raises Exception, and panics
    reason = f"{folder}: the tokenizer can't be read: {error}"
    raise UserError(reason) from error
  _name_ends(tokenizer, folder)
  if not tokenizer.is_fast or tokenizer.pad_token_id is None:
    raise UserError(
      f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer with a "
      "padding token."
    )
  return tokenizer


def _is_own(folder: Path) -> bool:
  """Whether the folder's network is one that transformers doesn't have."""
  path = folder / "config.json"
  kind = read_json(path).get("model_type") if path.is_file() else None
  known = isinstance(kind, str) and kind in FAMILIES
  return known and family_of({"model_type": kind}).own


def _name_ends(tokenizer: Any, folder: Path) -> None:
  """Give the tokenizer what decoders' folders leave out.

  The tokens that begin and end a text may be named by config.json alone. A
  padding token is any: attention never looks at it.
  """
  path = folder / "config.json"
  fields = read_json(path) if path.is_file() else {}
  for name in ("bos", "eos"):
    ids = fields.get(f"{name}_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    known = isinstance(first, int) and first in range(len(tokenizer))
    if getattr(tokenizer, f"{name}_token") is None and known:
      word = tokenizer.convert_ids_to_tokens(first)
      setattr(tokenizer, f"{name}_token", word)
  if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
    tokenizer.pad_token = tokenizer.eos_token
