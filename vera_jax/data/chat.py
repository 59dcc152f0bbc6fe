"""Messages in the form that a chat model was trained on.

What stands around a message comes from the tokenizer's own chat template, a
jinja2 text, which `chat_process.py` renders in a sandbox and within a time.
"""

import atexit
import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.errors import UserError

# Of processor time for each rendering; a usual template takes 0.1 ms.
SECONDS = 5.0
ASSISTANT = "assistant"  # whose messages a model learns
Message = dict[str, Any]  # "role" and "content"
_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SCRIPT = Path(__file__).with_name("chat_process.py")


class Rendered(NamedTuple):
  """A conversation as one text.

  Attributes:
    text: the whole text, with every special token in it.
    spans: [start, end) of what is learned of it, in characters.
    with_header: whether a span has what the template writes before an answer
      too, since the template ignores add_generation_prompt.
  """

  text: str
  spans: list[tuple[int, int]]
  with_header: bool = False


def message_ids(tokenizer: Any, message: str) -> list[int]:
  """The tokens of a user's message, up to where the model's answer begins.

  Raises:
    UserError: as for `chat_ids`.
  """
  return chat_ids(tokenizer, [{"role": "user", "content": message}])


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
  """The tokens of a conversation, up to where the model's answer begins.

  Raises:
    UserError: the tokenizer has no chat template, jinja2 is not installed, or
      the template fails.
  """
  text = _render(tokenizer, messages, prompt=True).text
  return tokenizer(text, add_special_tokens=False)["input_ids"]


def render_conversation(
  tokenizer: Any, messages: Sequence[Message]
) -> Rendered:
  """A whole conversation, and which of its characters are learned.

  Those are what the template's {% generation %} tags enclose. Where it has
  none, they are what each answer adds to the conversation before it, for which
  the template is rendered with the messages up to there.

  Raises:
    UserError: as for `chat_ids`, or a conversation up to some message is not
      how the whole one begins, so that nobody can say which part is an answer.
  """
  tags = bool(_TAGS.search(template_of(tokenizer)))
  rendered = _render(tokenizer, messages, tags=tags)
  if tags:
    return rendered
  text, spans, with_header = rendered
  for number, message in enumerate(messages):
    if message["role"] != ASSISTANT:
      continue
    before = _render(tokenizer, messages[:number], prompt=True).text
    until = _render(tokenizer, messages[: number + 1]).text
    for part in (before, until):
      if not text.startswith(part):
        raise UserError(_no_prefix(tokenizer, number, part, text))
    spans.append((len(before), len(until)))
    answer = until[len(before) :].lstrip()
    if not answer.startswith(message["content"].strip()):
      # either thoughts, which the model writes too, or a header to ask with
      without = _render(tokenizer, messages[:number]).text
      with_header = with_header or before == without
  return Rendered(text, spans, with_header)


def template_of(tokenizer: Any) -> str:
  """The chat template of a tokenizer, where several the one for plain chats.

  Raises:
    UserError: it has none.
  """
  if tokenizer.chat_template is None:
    raise UserError(
      f"The tokenizer of {tokenizer.name_or_path} has no chat template: the"
      " model continues texts and was not trained to answer messages. Take"
      " its instruct version; or train with config.data.template=alpaca or"
      " plain, and ask with --template=alpaca or plain."
    )
  try:
    return tokenizer.get_chat_template()
  except ValueError as error:
    raise UserError(_fails(tokenizer, error)) from error


def _render(
  tokenizer: Any,
  messages: Sequence[Message],
  *,
  prompt: bool = False,
  tags: bool = False,
) -> Rendered:
  template = template_of(tokenizer)
  if importlib.util.find_spec("jinja2") is None:
    raise UserError("A chat template needs jinja2: pip install -U jinja2.")
  variables = {k: str(x) for k, x in tokenizer.special_tokens_map.items()}
  request = {
    "template": template,
    "messages": list(messages),
    "variables": variables,
    "prompt": prompt,
    "tags": tags,
    "seconds": SECONDS,
  }
  answer = _PROCESS.ask(request)
  if "error" in answer:
    raise UserError(_fails(tokenizer, answer["error"]))
  return Rendered(answer["text"], [(a, b) for a, b in answer["spans"]])


def _fails(tokenizer: Any, reason: Any) -> str:
  name = tokenizer.name_or_path
  return f"The chat template of {name} can't be used: {reason}"


def _no_prefix(tokenizer: Any, number: int, part: str, text: str) -> str:
  pairs = zip(part, text, strict=False)
  same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(text))
  return _fails(
    tokenizer,
    f"rendered up to message {number + 1}, a conversation is not how the whole"
    " one begins, so that the answer's place is not known. They part at"
    f" character {same}: {part[same : same + 40]!r} and"
    f" {text[same : same + 40]!r}. A template with {{% generation %}} around"
    " its answers says it: put one into the model's chat_template.jinja.",
  )


class _Process:
  """The process that renders, started when it is needed first."""

  def __init__(self) -> None:
    self._child: subprocess.Popen[str] | None = None
    self._lock = threading.Lock()

  def ask(self, request: dict[str, Any]) -> dict[str, Any]:
    """Its answer; where it ended, an error that says so."""
    line = json.dumps(request) + "\n"
    with self._lock:
      if self._child is None:
        self._child = subprocess.Popen(
          # -P: no module beside the script is taken for another package
          [sys.executable, "-P", str(_SCRIPT)],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL,
          text=True,
        )
      child = self._child
      assert child.stdin is not None and child.stdout is not None
      try:
        child.stdin.write(line)
        child.stdin.flush()
        answer = child.stdout.readline()
      except BrokenPipeError:
        answer = ""
      except BaseException:  # Ctrl-C, say
        # the answer, still unread, would be taken for the next request's
        self._end()
        raise
      if answer.endswith("\n"):  # else it ended while it wrote
        return json.loads(answer)
      code = child.wait()
      self._end()
    if code == -signal.SIGXCPU:
      seconds = 2 * SECONDS
      return {"error": f"it takes more than {seconds:g} seconds"}
    return {"error": f"the process that renders it ended with the code {code}"}

  def end(self) -> None:
    with self._lock:
      self._end()

  def _end(self) -> None:
    child, self._child = self._child, None
    if child is not None:
      child.kill()
      child.communicate()


_PROCESS = _Process()
atexit.register(_PROCESS.end)
