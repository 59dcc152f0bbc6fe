"""Texts from elsewhere are shown on a terminal, which they don't command."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from rich.table import Table

from vera_jax.terminal import LINES, Console, json_line, printable

ROOT = Path(__file__).parents[1]
TITLE = "\x1b]0;mine\x07"  # sets the title of many terminals


@pytest.mark.parametrize(
  "text, shown",
  [
    ("plain, naïve 语 👩‍🔬", "plain, naïve 语 👩‍🔬"),
    ("a\tb\r\nc", r"a\tb\r\nc"),
    (TITLE, r"\x1b]0;mine\x07"),
    ("\x9b2J\u202e\u2028\x7f", r"\x9b2J\u202e\u2028\x7f"),
    (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
    (3, "3"),
  ],
)
def test_control_characters_are_escapes(text, shown):
  assert printable(text) == shown
  shown.encode()


def test_json_loses_nothing():
  value = {"la\tbel": f"{TITLE}\x9b\u202e\x7fé", "n": [1.5, None]}
  line = json_line(value)
  assert json.loads(line) == value
  assert line == printable(line) and "é" in line


def test_a_console_takes_no_text_for_a_style(capsys):
  out = io.StringIO()
  console = Console(file=out, width=60, force_terminal=True)
  table = Table("label [red]", title=TITLE)
  table.add_row("[/nothing] :smile: \x1b[2J")
  console.print(table)
  console.print(f"[bold]x\n{TITLE}")
  for text in ("label [red]", "[/nothing] :smile: \\x1b[2J", "[bold]x\n"):
    assert text in out.getvalue()
  assert TITLE not in out.getvalue() and "\x1b[2J" not in out.getvalue()
  assert printable("a\nb\tc", keep=LINES) == "a\nb\tc"


def test_a_reader_that_goes_away(monkeypatch):
  """It stops a table, but not the run whose progress it read."""
  for name in ("stdout", "stderr"):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", closefd=False) as pipe:
      monkeypatch.setattr(f"sys.{name}", pipe)
      console = Console(stderr=name == "stderr")
      if name == "stderr":
        console.print("a line")
        console.print("another")
      else:
        with pytest.raises(BrokenPipeError):
          console.print("a line")
      monkeypatch.undo()
      os.dup2(os.open(os.devnull, os.O_WRONLY), write)
    os.close(write)


def test_commands_print_through_it():
  for folder in ("vera_jax", "experiments"):
    for file in (ROOT / folder).rglob("*.py"):
      text = file.read_text(encoding="utf-8")
      assert not re.search(r"from rich.console import .*\bConsole\b", text), (
        file
      )
