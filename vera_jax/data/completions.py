"""Texts to learn word by word: whole ones, or completions of prompts.

An example's tokens are one sequence, of which a part is learned: each token
from those before it.

  a text          [begin] text [end]                  text and [end] are learned
  with a prompt   [begin] prompt completion [end]     the same of the completion

[begin] is what the tokenizer itself puts before a text, often nothing, and
[end] its end-of-text token. With `separate` another [end] follows the prompt,
as GPT-2's experiments have it. Prompt and completion are split into tokens
apart, as they are when a model is asked, so whoever writes them sees to the
space between them.
"""

from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from vera_jax.data.examples import Examples
from vera_jax.errors import UserError

SIDES = ("left", "right")
_CHUNK = 4096  # texts tokenised at a time, which bounds the memory


class Completions(NamedTuple):
  """How sequences are made of `Examples`: `first` are the texts, or the prompts
  where `second` has completions.

  Attributes:
    cut: the side on which a sequence that is too long loses tokens: "left", of
      its beginning, or "right". [begin] always stays.
    separate: whether an end-of-text token stands between prompt and completion.
  """

  cut: str
  separate: bool = False

  def checked(self) -> "Completions":
    if self.cut not in SIDES:
      raise UserError(
        f"config.data.cut is {self.cut!r}; choose {' or '.join(SIDES)}, the"
        " side on which texts that are too long are cut."
      )
    return self


def end_of_text(tokenizer: Any) -> int:
  """The token that ends a text.

  Raises:
    UserError: the tokenizer names none.
  """
  if tokenizer.eos_token_id is None:
    raise UserError(
      "The tokenizer has no end-of-text token, which a model must learn to"
      " give: set eos_token in tokenizer_config.json."
    )
  return int(tokenizer.eos_token_id)


def prompt_ids(
  tokenizer: Any, prompts: list[str], *, how: Completions
) -> list[list[int]]:
  """The tokens of prompts as training has them, up to the completion."""
  begin = begin_of_text(tokenizer)
  between = [end_of_text(tokenizer)] if how.separate else []
  encoded = _plain_ids(tokenizer, prompts)
  return [[*begin, *ids, *between] for ids in encoded]


def encode_completions(
  examples: Examples, tokenizer: Any, max_length: int, how: Completions
) -> dict[str, np.ndarray]:
  """The sequences of all examples and which of their tokens are learned.

  Returns:
    `ids`, `offsets`, `token_types`, `truncated` as `tokens.Tokens` has them,
    and bool [tokens] `learned`.

  Raises:
    UserError: nothing is left to learn of an example once it is cut.
  """
  how.checked()
  begin, end = begin_of_text(tokenizer), end_of_text(tokenizer)
  if max_length < len(begin) + 2:
    raise UserError(
      f"config.data.max_length is {max_length}; at least {len(begin) + 2}"
      " tokens are needed to learn one from another."
    )
  ids: list[list[int]] = []
  learned: list[list[bool]] = []
  truncated, empty = 0, []
  for start in range(0, len(examples.first), _CHUNK):
    chunk = slice(start, start + _CHUNK)
    first: Any = _plain_ids(tokenizer, examples.first[chunk])
    if examples.second:
      after = _plain_ids(tokenizer, examples.second[chunk])
      if how.separate:
        first = [[*prompt, end] for prompt in first]
    else:
      first, after = [[] for _ in first], first
    for prompt, words in zip(first, after, strict=True):
      body = [*prompt, *words, end]
      is_learned = [False] * len(prompt) + [True] * (len(words) + 1)
      room = max_length - len(begin)
      if len(body) > room:
        truncated += 1
        kept = slice(-room, None) if how.cut == "left" else slice(room)
        body, is_learned = body[kept], is_learned[kept]
      body, is_learned = begin + body, [False] * len(begin) + is_learned
      is_learned[0] = False  # nothing comes before it
      if not any(is_learned):
        empty.append(len(ids))
      ids.append(body)
      learned.append(is_learned)
  if empty:
    raise UserError(
      f"Of {len(empty)} examples, the first of them {examples.place(empty[0])},"
      f" nothing is left to learn within {max_length} tokens: set"
      " config.data.max_length higher, or config.data.cut=left to cut what"
      " comes first."
    )
  return as_arrays(ids, learned, truncated=truncated)


def as_arrays(
  ids: list[list[int]], learned: list[list[bool]], *, truncated: int
) -> dict[str, np.ndarray]:
  """The sequences one behind the other, as `encode_completions` has them."""
  flat = np.fromiter(chain.from_iterable(ids), np.int32)
  return {
    "ids": flat,
    "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
    "token_types": np.zeros_like(flat),
    "truncated": np.array(truncated),
    "learned": np.fromiter(chain.from_iterable(learned), bool),
  }


def begin_of_text(tokenizer: Any) -> list[int]:
  """What the tokenizer puts before each text: its bos_token, or nothing."""
  bos = tokenizer.bos_token_id
  if bos is not None and tokenizer("")["input_ids"][:1] == [bos]:
    return [int(bos)]
  return []


def _plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
  """Without special tokens."""
  return tokenizer(texts, add_special_tokens=False)["input_ids"]
