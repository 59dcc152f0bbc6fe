"""The pages of all commands and settings, from the code: docs/commands.md and
docs/settings.md.

  python -m experiments.reference           write them
"""

import ast
import re
from importlib import import_module
from pathlib import Path

from configs import common
from experiments import cli
from experiments.console import COMMANDS, FOLDER, TRAIN, as_typed
from experiments.markdown import markdown_table
from experiments.settings import CONFIGS, Setting, settings, shown
from vera_jax.adapters.methods import METHODS

DOCS = Path(__file__).parents[1] / "docs"
BY = "<!-- written by python -m experiments.reference -->"
# Configs that have settings which not all have.
WITH_MORE = (
  ("text", "texts and labels of your own"),
  ("language", "a decoder on texts of your own"),
  ("instruct:smollm2", "instructions"),
  ("e2e:smollm2", "sentences from facts"),
  ("images/cifar10", "images"),
)


def main() -> None:
  for page, text in pages().items():
    (DOCS / page).write_text(text, encoding="utf-8")
    print(f"docs/{page}")


def pages() -> dict[str, str]:
  """The text of each page."""
  return {"commands.md": commands_page(), "settings.md": settings_page()}


def commands_page() -> str:
  parts = [
    f"{BY}\n# Commands\n",
    "For those who type commands, and those who read their exit codes.\n",
    "`pip install` puts the command `vera-jax` on the path; `python -m"
    " vera_jax` is the same. `make` installs it into a checkout's `.venv` too,"
    " where `python -m experiments.NAME` is the same as `vera-jax NAME`."
    " `vera-jax COMMAND --help` lists the flags as well.\n",
    markdown_table(("flags of all commands", ""), list(FLAGS.items()), texts=2),
    "\n## Exit codes\n",
    markdown_table(
      ("code", "meaning"),
      [(str(code), text) for code, text in cli.EXIT_CODES.items()],
      texts=2,
    ),
  ]
  for name in COMMANDS:
    parts.append(f"\n## {name}\n\n```text\n{usage(name)}\n```")
  parts.append("\n## What train does, by kind of data")
  for name in TRAIN:
    parts.append(f"\n### {name}\n\n```text\n{usage(name)}\n```")
  return "\n".join(parts) + "\n"


FLAGS = {
  "`--help`": "what the command does, its flags, and for `train` all settings",
  "`--quiet`": "results, warnings and errors alone",
  "`--json`": "the result as one JSON object on standard output, all else on"
  " standard error (`train`, `sweep`, `merge`, `peft`, `push`);"
  " `predict --format=jsonl` and `report --format=json` are theirs",
  "`--print_config`": "every setting with its value, its default if that is"
  " another, and what it is; nothing is trained (`train`, `sweep`, `plan`)",
  "`vera-jax --version`": "the version",
}


def usage(name: str) -> str:
  """What a command says of itself, as it is typed at a console."""
  source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
  return as_typed(str(ast.get_docstring(ast.parse(source))), at_console=True)


def settings_page() -> str:
  config = common.get_config()
  of_all = settings(config, config, CONFIGS / "common.py")
  keys = {setting.key for setting in of_all}
  parts = [
    f"{BY}\n# Settings\n",
    "For those who change what a run does.\n",
    "Any of them is changed on the command line: `--config.optim.epochs=3`."
    " `vera-jax train --config=NAME --print_config` shows those of a config,"
    " with its own defaults. An empty default is not set.\n",
    "## Of every config\n",
    table([s for s in of_all if s.key.split(".")[0] not in METHODS]),
  ]
  for name, what in WITH_MORE:
    path, _, variant = name.partition(":")
    module = import_module(f"configs.{path.replace('/', '.')}")
    config = module.get_config(*filter(None, [variant]))
    file = CONFIGS / f"{path}.py"
    more = [s for s in settings(config, config, file) if s.key not in keys]
    parts += [f"\n## `--config={name}`: {what}\n", table(more)]
  parts.append("\n## Of the methods\n")
  for name, method in METHODS.items():
    parts.append(f"### {name}\n\n{method.title}: `{method.weights}`\n")
    if method.group != name:
      parts.append(f"It takes the settings of {method.group}.\n")
      continue
    rows = [
      Setting(f"{name}.{key}", default, default, text)
      for key, default, text in method.described()
    ]
    parts.append(table(rows) + "\n")
  return "\n".join(parts).rstrip() + "\n"


def table(rows: list[Setting]) -> str:
  """Settings as Markdown."""
  cells = [
    (f"`{s.key}`", f"`{x}`" if (x := shown(s.default)) else "", _cell(s.text))
    for s in rows
  ]
  return markdown_table(("setting", "default", "meaning"), cells, texts=3)


def _cell(text: str) -> str:
  return re.sub(r"(?<!\\)\|", r"\\|", text)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
