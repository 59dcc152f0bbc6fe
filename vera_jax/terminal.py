"""Texts from elsewhere on a terminal, where they are shown and not obeyed.

Labels, names and texts come out of other people's files. A terminal takes some
characters for commands (clear the screen, change the title, write from right to
left), and rich takes [words in brackets] for styles. What is printed here is
printed as it is, with such characters as escapes.
"""

import json
import re
from typing import Any

import rich.console

# Control characters, ends of lines and paragraphs, marks that turn the
# direction of writing, and halves of characters (of file names not in UTF-8).
UNSAFE = re.compile(
  "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
LINES = "\n\t"  # what a text of several lines may hold


def printable(text: Any, *, keep: str = "") -> str:
  """A text on one line, with a tab as \\t and a control character as \\x1b.

  Args:
    text: or anything else, as `str` has it.
    keep: characters that stay as they are.
  """

  def escaped(match: re.Match[str]) -> str:
    one = match[0]
    return one if one in keep else one.encode("unicode_escape").decode()

  return UNSAFE.sub(escaped, str(text))


def json_line(value: Any) -> str:
  """A value as JSON on one line that any terminal may show.

  Nothing is lost: what `printable` escapes is written as \\uXXXX.
  """
  text = json.dumps(value, ensure_ascii=False)
  return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Console(rich.console.Console):
  """rich's, to which every text is plain: no markup, no :emoji:, no escapes.

  Attributes:
    hushed: whether nothing is shown on standard error: by --quiet.
  """

  hushed = False

  def __init__(self, **options: Any) -> None:
    if self.hushed and options.get("stderr"):
      options["quiet"] = True
    super().__init__(markup=False, emoji=False, highlight=False, **options)

  def print(self, *objects: Any, **options: Any) -> None:
    """rich's, but where no terminal is, lines stay as long as they are: what
    reads a file or a pipe wants a path in one piece."""
    if not self.is_terminal and all(isinstance(x, str) for x in objects):
      options.setdefault("soft_wrap", True)
    super().print(*objects, **options)

  def on_broken_pipe(self) -> None:
    """Called while a BrokenPipeError is handled; rich's own ends the process.

    Whoever stops reading how a run goes on does not stop the run.
    """
    if not self.stderr:
      raise
    self.quiet = True

  def render_str(self, text: str, **options: Any) -> Any:
    return super().render_str(printable(text, keep=LINES), **options)
