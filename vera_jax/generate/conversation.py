"""A conversation's tokens, in the form that a decoder was trained on, and what
a decoder has read of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from vera_jax.data.chat import chat_ids
from vera_jax.data.completions import begin_of_text
from vera_jax.data.templates import CHAT, PLAIN, alpaca_prompt
from vera_jax.errors import UserError
from vera_jax.models.decoder import Cache


@dataclass
class Past:
  """What a decoder has read and written of a text that goes on.

  Attributes:
    ids: the tokens; the cache has all but the last.
    cache: one row; None before anything was read.
  """

  ids: list[int] = field(default_factory=list)
  cache: Cache | None = None

  def same_as(self, tokens: Sequence[int]) -> int:
    """How many of a text's first tokens the cache has. Its last one is always
    read anew, for the logits behind it."""
    pairs = zip(self.ids[:-1], tokens[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def conversation_ids(
  tokenizer: Any, messages: Sequence[dict[str, Any]], *, template: str
) -> list[int]:
  """The tokens of a conversation up to where the model's next answer begins.

  Further questions to a model without a chat template are put below its last
  answer in the same form as the first; it was not trained on such.

  Args:
    tokenizer: the decoder's.
    messages: of users and the assistant by turns, a user's last.
    template: a name in `data.templates.TEMPLATES`.

  Raises:
    UserError: as for `chat_ids`, or without a chat template the messages are
      no such turns.
  """
  if template == CHAT:
    return chat_ids(tokenizer, messages)
  roles = [message["role"] for message in messages]
  turns = [("user", "assistant")[i % 2] for i in range(len(roles))]
  if roles != turns or roles[-1] != "user":
    raise UserError(
      f"In the form {template} there are messages of user and assistant by"
      " turns, the last one the user's."
    )
  text = ""
  for message in messages:
    content = message["content"]
    if message["role"] == "user":
      asked = content if template == PLAIN else alpaca_prompt(content)
      text += f"\n\n{asked}" if text else asked
    else:
      text += content
  return [
    *begin_of_text(tokenizer),
    *tokenizer(text, add_special_tokens=False)["input_ids"],
  ]
