"""VeRA and its relatives on the command line: train, ask, merge, share.

vera-jax COMMAND --help
vera-jax train --config=text --config.data.train=reviews.csv
vera-jax predict --adapter=RUN/adapter --input=more.csv
"""

import ast
import difflib
import os
import re
import runpy
import shutil
import sys
import textwrap
from pathlib import Path

from experiments import handle_ctrl_c

FOLDER = Path(__file__).parent
# The commands that --help lists, in the order in which one comes to need them.
COMMANDS = (
  *("train", "predict", "generate", "chat", "serve", "merge", "peft"),
  *("gguf", "push", "sweep", "report", "plan", "launch"),
)
# These run too: what a command above, or a page, names for a purpose.
OTHERS = (
  *("answer", "e2e_score", "pictures", "quickstart", "rehearse", "reproduce"),
  *("ridge", "table1"),
)
# `train` is what these do; each says more of its own data and settings.
TRAIN = "classify", "e2e", "glue", "images", "instruct", "language"
HELP = ("-h", "--help", "-help", "--helpshort", "help")


def main() -> None:
  """Run the script that the first word names, with the words behind it."""
  handle_ctrl_c()
  words = sys.argv[1:]
  if words[:1] in (["--version"], ["version"]):
    from vera_jax.version import __version__

    print(f"vera_jax {__version__}")
    return
  if words[:1] == ["help"] and words[1:]:
    words = [words[1], "--help"]
  if not words or words[0] in HELP:
    try:
      print(overview(), flush=True)
    except BrokenPipeError:  # a reader such as `head` has enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0 if words else 2)
  name, *rest = words
  known = COMMANDS + OTHERS + TRAIN
  if name not in known:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Is it {' or '.join(near)}?" if near else ""
    print(
      f"There is no command {name!r}.{hint} The commands are:"
      f" {', '.join(COMMANDS)}. --help says what each does.",
      file=sys.stderr,
    )
    sys.exit(2)
  sys.argv = [f"vera-jax {name}", *rest]
  runpy.run_module(f"experiments.{name}", run_name="__main__")


def overview() -> str:
  """The commands, each with the first line of what it says of itself."""
  lines = [str(__doc__), "Commands:"]
  for name in COMMANDS:
    # read, not imported: that would take seconds
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    summary = str(ast.get_docstring(ast.parse(source))).partition("\n")[0]
    lines += textwrap.wrap(
      summary,
      min(80, shutil.get_terminal_size().columns),
      initial_indent=f"  {name:<10}",
      subsequent_indent=" " * 12,
    )
  return "\n".join(lines)


def as_typed(text: str, *, at_console: bool | None = None) -> str:
  """A script's text with its commands as they are typed at the console.

  Args:
    text: that names them as modules.
    at_console: whether to do so. Unset: where the console runs the script.
  """
  if at_console is None:
    at_console = sys.argv[0].startswith("vera-jax")
  if not at_console:
    return text

  def command(match: re.Match[str]) -> str:
    return f"vera-jax {'train' if match[1] in TRAIN else match[1]}"

  return re.sub(r"(?:python -m )?\bexperiments\.(\w+)", command, text)


if __name__ == "__main__":
  main()
