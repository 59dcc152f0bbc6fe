"""Renders chat templates, in a process of its own; `chat.py` starts it.

A template is a program that somebody else wrote. jinja2's sandbox keeps it away
from files and from Python's insides, but not from looping for ever or filling
the memory. So it runs here, with limits of processor time, memory and the
answer's size: a loop ends with an error, and what can't be interrupted ends
this process alone.

A template that prints today's date (strftime_now) is given `DATE` on any day,
so that tokens and their cache don't depend on when they are made, and a model
is asked as it was trained.

Each line of standard input is a request in JSON, and is answered by a line:

  {"template", "messages", "variables", "prompt", "tags", "seconds"}
  {"text", "spans"} or {"error"}

`prompt` adds what stands before an answer; `tags` asks for the places
[start, end) of what {% generation %} encloses, in characters.

It imports nothing of this package: starting is the longest part as it is.
"""

import contextlib
import json
import resource
import signal
import string
import sys
from datetime import UTC, datetime
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space
# The most characters of a text: so many, and more for a long conversation.
SIZE, TIMES = 1_000_000, 100
# What Llama 3's template has where it knows no date.
DATE = datetime(2024, 7, 26, tzinfo=UTC)
# What each of a format's fields is on that date; "%-d" has no leading zero.
FIELDS = {
  field: DATE.strftime(field)
  for flag in ("-", "")
  for field in (f"%{flag}{x}" for x in string.ascii_letters if x != "s")
}
# In front of a template it takes the place of transformers' own strftime_now.
# The line's end behind it is trimmed.
STRFTIME_NOW = (
  "{% macro strftime_now(format) %}"
  "{% set made = namespace(text=format) %}"
  "{% for field, value in date_fields.items() %}"
  "{% set made.text = made.text.replace(field, value) %}"
  "{% endfor %}{{ made.text }}{% endmacro %}\n"
)


class OutOfTime(Exception):
  """A template has used its processor time."""


def render(request: dict[str, Any]) -> dict[str, Any]:
  """The answer to a request; a template can raise anything."""
  try:
    from transformers.utils.chat_template_utils import render_jinja_template
  except Exception as error:
    return {"error": f"transformers can't be imported: {error!r}"[:1000]}
  template, variables = request["template"], request["variables"]
  if "strftime_now" in template:
    template = STRFTIME_NOW + template
    variables = {**variables, "date_fields": FIELDS}
  seconds = request["seconds"]
  used = resource.getrusage(resource.RUSAGE_SELF)
  # for one long operation inside of Python, which no signal's handler ends
  most = int(used.ru_utime + used.ru_stime + 2 * seconds) + 1
  _, hard = resource.getrlimit(resource.RLIMIT_CPU)
  resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
  signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
  rendered: Any
  try:
    rendered = render_jinja_template(
      [request["messages"]],
      chat_template=template,
      add_generation_prompt=request["prompt"],
      return_assistant_tokens_mask=request["tags"],
      **variables,
    )
  except OutOfTime:
    return {"error": f"it takes more than {seconds:g} seconds"}
  except MemoryError:
    return {"error": "it fills the memory"}
  except Exception as error:
    return {"error": str(error)[:1000] or type(error).__name__}
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
  (text,), spans = rendered
  try:
    text.encode()
  except UnicodeEncodeError:
    return {"error": "it makes a text with half a character"}
  spans = spans[0] if request["tags"] else []
  written = sum(len(message["content"]) for message in request["messages"])
  most = SIZE + TIMES * written
  if max(len(text), len(spans)) > most:
    return {
      "error": f"of {written:,} characters in the messages it makes a text of"
      f" {len(text):,}; {most:,} are allowed"
    }
  return {"text": text, "spans": spans}


def main() -> None:
  def stop(number: int, frame: Any) -> None:
    raise OutOfTime

  signal.signal(signal.SIGVTALRM, stop)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
  with contextlib.suppress(ValueError, OSError):  # not on every system
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  for line in sys.stdin:
    print(json.dumps(render(json.loads(line))), flush=True)


if __name__ == "__main__":
  main()
