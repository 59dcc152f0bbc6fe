"""Answers to learn: conversations and instructions, each as one text.

A text is split into tokens once, as a whole, and a token is learned where it
has a character of an answer. When the model is used, the text before an answer
is split alone, and its last tokens can be others: of "Translate: " and "chat"
GPT-2 learns the token " chat", but it is asked behind the token " ". Rows with
such an answer are counted, and a run's first lines say so. Prompts that do not
end with white space avoid it, and so do most chat templates, whose answers
follow a special token or a line's end.

  template    the text                                         learned
  chat        what the tokenizer's chat template makes of it   see `chat.py`
  otherwise   [begin] prompt answer [end]                      answer and [end]

[begin] and [end] are those of `completions.py`; a chat template has its own.
What it writes behind the token that ends an answer, often a line's end, is not
learned: when the model is used, nobody asks for it. A text ends with its last
learned token.
"""

import json
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from vera_jax.data.chat import Rendered, render_conversation
from vera_jax.data.completions import as_arrays, begin_of_text, end_of_text
from vera_jax.data.examples import Examples
from vera_jax.data.templates import CHAT
from vera_jax.errors import UserError

_CHUNK = 1024  # texts tokenised at a time, which bounds the memory
_SHOWN = 600  # characters of an example in a message
# What is counted of the texts, and what a run's first lines say of those rows.
COUNTS = {
  "special": "have the text of a special token in them, which the model reads"
  " as that token",
  "split_apart": "have an answer that changes how its prompt is split into"
  " tokens, so that the model is asked behind other tokens than it learns from:"
  " end prompts without a space, and begin completions with it",
  "without_end": "have an answer whose last learned token is no special one, so"
  " that the model does not learn to end it: the chat template writes none"
  " there, or writes it behind {% endgeneration %}",
  "with_header": "have an answer that is learned together with what the chat"
  " template writes before it, since the template ignores"
  " add_generation_prompt",
}


class Answers(NamedTuple):
  """How `Examples` become texts.

  Attributes:
    template: "chat": `first` has conversations, each a list of messages in
      JSON. Any other name: `first` has prompts and `second` their answers.
  """

  template: str
  cut: str = "right"  # a text that is too long loses its end


def encode_answers(
  examples: Examples, tokenizer: Any, max_length: int, how: Answers
) -> dict[str, np.ndarray]:
  """The tokens of all examples and which of them are learned.

  Texts are cut on the right. Of an example whose answers lie behind the cut
  nothing is learned; whoever takes the tokens leaves it out.

  Returns:
    `ids`, `offsets`, `token_types` and `truncated` as `tokens.Tokens` has them,
    bool [tokens] `learned`, and the number of texts for each of `COUNTS`.

  Raises:
    UserError: nothing of an example is learned, cut or not, or all of it: no
      answer was found, or no prompt; or the chat template fails. The message
      begins with the example's place and shows its text.
  """
  chat = how.template == CHAT
  begin = [] if chat else begin_of_text(tokenizer)
  end = [] if chat else [end_of_text(tokenizer)]
  least = len(begin) + 2
  if max_length < least:
    raise UserError(
      f"config.data.max_length is {max_length}; at least {least} tokens are"
      " needed to learn one from another."
    )
  # transformers lists those with a role, such as eos_token, apart from others
  added = tokenizer.added_tokens_decoder.items()
  unnamed = {i: token.content for i, token in added if token.special}
  special = {*unnamed, *tokenizer.all_special_ids}
  names = {*unnamed.values(), *tokenizer.all_special_tokens}
  ids: list[list[int]] = []
  learned: list[list[bool]] = []
  truncated, counts = 0, dict.fromkeys(COUNTS, 0)
  for start in range(0, len(examples.first), _CHUNK):
    numbers = range(start, min(start + _CHUNK, len(examples.first)))
    texts = [_text(examples, i, tokenizer, chat=chat) for i in numbers]
    for i in numbers:
      written = _written(examples, i, chat=chat)
      counts["special"] += any(
        name in text for name in names for text in written
      )
    encoded = tokenizer(
      [text.text for text in texts],
      add_special_tokens=False,
      return_offsets_mapping=True,
    )
    counts["with_header"] += sum(text.with_header for text in texts)
    prompts = [text.text[:first] for text in texts for first, _ in text.spans]
    asked: Iterator[list[int]] = iter(())
    if prompts:  # of none, transformers makes an IndexError
      asked = iter(tokenizer(prompts, add_special_tokens=False)["input_ids"])
    rows = zip(
      numbers,
      texts,
      encoded["input_ids"],
      encoded["offset_mapping"],
      strict=True,
    )
    for number, text, row, offsets in rows:
      marks = learned_tokens(text, row, offsets, special=special)
      _check(marks, row, text, special, place=examples.place(number))
      alone = list(islice(asked, len(text.spans)))
      counts["split_apart"] += any(
        row[: len(prompt)] != prompt for prompt in alone
      )
      behind = [*marks[1:], False]
      ends = zip(row, marks, behind, strict=True)
      counts["without_end"] += chat and any(
        mark and not more and i not in special for i, mark, more in ends
      )
      last = len(marks) - marks[::-1].index(True)  # nothing behind it counts
      row = [*begin, *row[:last], *end]
      marks = [*map(bool, begin), *marks[:last], *(True for _ in end)]
      marks[: len(begin) or 1] = [False] * (len(begin) or 1)
      truncated += len(row) > max_length
      ids.append(row[:max_length])
      learned.append(marks[:max_length])
  if len(examples) and not any(map(any, learned)):
    raise UserError(
      f"Of none of the {len(examples)} examples anything is left to learn"
      f" within {max_length} tokens (the mask is all 0): set"
      f" config.data.max_length higher. One of them:\n{_shown(texts[0])}"
    )
  return {
    **as_arrays(ids, learned, truncated=truncated),
    **{name: np.array(count) for name, count in counts.items()},
  }


def _written(examples: Examples, number: int, *, chat: bool) -> list[str]:
  """What people wrote of an example."""
  if chat:
    return [m["content"] for m in json.loads(examples.first[number])]
  assert examples.second is not None
  return [examples.first[number], examples.second[number]]


def _text(
  examples: Examples, number: int, tokenizer: Any, *, chat: bool
) -> Rendered:
  if chat:
    try:
      messages = json.loads(examples.first[number])
      return render_conversation(tokenizer, messages)
    except UserError as error:
      raise UserError(f"{examples.place(number)}: {error}") from error
  prompt, answer = _written(examples, number, chat=False)
  return Rendered(prompt + answer, [(len(prompt), len(prompt + answer))])


def learned_tokens(
  text: Rendered,
  ids: list[int],
  offsets: list[tuple[int, int]],
  *,
  special: Collection[int] = (),
) -> list[bool]:
  """Which tokens have a character of a span, up to the one that ends it.

  Args:
    text: the whole text, and which of its characters are learned.
    ids: its tokens.
    offsets: [start, end) of each of them in the text's characters.
    special: ids of which one may end a span; spaces behind it don't count.
  """
  marks = [False] * len(ids)
  for first, last in text.spans:
    inside = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
    ends = [i for i in inside if ids[i] in special]
    if ends and not text.text[offsets[ends[-1]][1] : last].strip():
      inside = [i for i in inside if i <= ends[-1]]
    for i in inside:
      marks[i] = True
  return marks


def _check(
  marks: list[bool],
  ids: list[int],
  text: Rendered,
  special: set[int],
  *,
  place: str,
) -> None:
  if not any(marks):
    raise UserError(
      f"{place}: nothing of it is learned (its mask is all 0), for no answer of"
      f" the assistant was found in its text:\n{_shown(text)}"
    )
  # a text begins with special tokens that nobody would take for a prompt
  if all(mark or i in special for mark, i in zip(marks, ids, strict=True)):
    raise UserError(
      f"{place}: all of it would be learned (its mask is all 1), for there is"
      f" nothing in its text that asks for an answer:\n{_shown(text)}"
    )


def _shown(text: Rendered) -> str:
  shown = text.text
  if len(shown) > _SHOWN:
    shown = f"{shown[: _SHOWN // 2]} … {shown[-_SHOWN // 2 :]}"
  return f"  {shown!r}"
