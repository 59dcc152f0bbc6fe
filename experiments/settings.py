"""The settings of a config: what each is, its default and what a run has.

What a setting is stands beside it in the file that makes it, as a comment, or
in the table of methods. Nothing of it is written twice.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import configs
from vera_jax.adapters.methods import METHODS

CONFIGS = Path(configs.__file__).parent
# What a config file calls the whole and its groups.
NAMES = ("config", "data", "optim")


class Setting(NamedTuple):
  """A setting of a config.

  Attributes:
    key: as --config.KEY has it.
    default: what the config's file says.
    value: what the run has.
    text: what it is; "" where nobody says.
  """

  key: str
  default: Any
  value: Any
  text: str

  def line(self) -> str:
    """The setting on a line, as long as it is."""
    line = f"--config.{self.key}={shown(self.value)}"
    if self.value != self.default:
      line += f"  (default: {shown(self.default)})"
    return f"{line}  # {self.text}" if self.text else line


def shown(value: Any) -> str:
  """A value as the command line takes it; nothing for one that is not set."""
  return "" if value is None else str(value).replace(", ", ",")


def settings(
  config: ConfigDict, default: ConfigDict, file: str | Path
) -> list[Setting]:
  """All settings of a config, in its order.

  Args:
    config: with the changes of the command line.
    default: the same without.
    file: that the config comes from.
  """
  said, defaults = texts(Path(file)), dict(_flat(default))
  of_methods = {
    f"{name}.{key}": text
    for name, method in METHODS.items()
    for key, _, text in method.described()
  }

  def text(key: str) -> str:
    key = key.removeprefix("base.")  # a sweep's runs have these
    group = key.partition(".")[0]
    return of_methods.get(key) or said.get(key) or said.get(group, "")

  return [
    Setting(key, defaults.get(key), value, text(key))
    for key, value in _flat(config)
  ]


def _flat(config: ConfigDict, above: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _flat(value, f"{above}{name}.")
    else:
      yield above + name, value


def texts(file: Path) -> dict[str, str]:
  """The comments of a config's file, and of those that it imports, by key.

  What a file that comes first says of a setting stays; of its data each task
  says its own.
  """
  source = file.read_text(encoding="utf-8")
  tree, lines = ast.parse(source), source.splitlines()
  said: dict[str, str] = {}
  for node in tree.body:
    if isinstance(node, ast.ImportFrom) and node.module:
      folder = CONFIGS.parent.joinpath(*node.module.split("."))
      for name in ("__init__", *(alias.name for alias in node.names)):
        imported = folder / f"{name}.py"
        if CONFIGS in imported.parents and imported.is_file():
          said = texts(imported) | said
  for made in ast.walk(tree):
    if not isinstance(made, ast.Assign):
      continue
    first, *path = ast.unparse(made.targets[0]).split(".")
    if first not in NAMES or not path:
      continue
    key = ".".join(path if first == "config" else [first, *path])
    text = _comment(lines, made)
    if text and (key not in said or key.startswith("data.")):
      said[key] = text
  return said


def _comment(lines: list[str], node: ast.Assign) -> str:
  """The comment behind an assignment, or right above it."""
  assert node.end_lineno is not None
  behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")[2]
  above: list[str] = []
  for line in reversed(lines[: node.lineno - 1]):
    if not line.strip().startswith("# "):
      break
    above.insert(0, line.strip()[2:])
  return "; ".join(filter(None, (" ".join(above), behind)))
