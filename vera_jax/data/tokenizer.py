"""Tokenizers from a folder in Hugging Face's layout; nothing is downloaded."""

from pathlib import Path
from typing import Any

from vera_jax.errors import UserError


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
