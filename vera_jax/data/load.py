"""A run's splits as tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vera_jax.data.answers import Answers
from vera_jax.data.completions import Completions
from vera_jax.data.examples import Examples, subset
from vera_jax.data.tokens import FolderTokenizer, Tokens, tokenise


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
    splits: of which "train" is cut to data.max_train_examples.
    data: config.data.
    folder: of the tokenizer.
    completions: as for `tokenise`.

  Raises:
    UserError: as for `subset` and `tokenise`, and by `read_split`.
  """
  cache = Path(data.cache_dir or "~/.cache/vera_jax/tokens").expanduser()
  tokenizer = FolderTokenizer(folder, cache)
  found = {}
  for split in splits:
    examples = read_split(data.source, split)
    if split == "train":
      examples = subset(examples, data.max_train_examples, data.subset_seed)
    found[split] = tokenise(
      examples, tokenizer, data.max_length, cache, completions=completions
    )
  return found
