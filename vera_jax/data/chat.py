"""A user's message in the form that a chat model was trained on."""

from typing import Any

from vera_jax.errors import UserError


def message_ids(tokenizer: Any, message: str) -> list[int]:
  """The tokens of a message, up to where the model's answer begins.

  What stands around the message, the tokens that begin a text among it, comes
  from the tokenizer's own chat template, a jinja2 text in a sandbox.

  Raises:
    UserError: the tokenizer has no chat template, jinja2 is not installed, or
      the template fails.
  """
  if tokenizer.chat_template is None:
    raise UserError(
      f"The tokenizer of {tokenizer.name_or_path} has no chat template: the"
      " model continues texts and was not trained to answer messages. Leave"
      " --chat out, or take the model's instruct version."
    )
  try:
    return tokenizer.apply_chat_template(
      [{"role": "user", "content": message}],
      add_generation_prompt=True,
      return_dict=False,
    )
  except ImportError as error:
    raise UserError(
      f"A chat template needs jinja2: pip install -U jinja2. ({error})"
    ) from error
  except Exception as error:  # a template can raise any
    raise UserError(
      f"The chat template of {tokenizer.name_or_path} can't be used: {error}"
    ) from error
