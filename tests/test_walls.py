"""No method, family or task is named outside its folder, tables excepted.

Names in code count: identifiers and texts, but no sentences, comments or
docstrings. What `make check` holds of imports (`[tool.importlinter]`) is not
repeated here.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

from vera_jax.adapters.methods import METHODS
from vera_jax.models.family import FAMILIES
from vera_jax.tasks.task import TASKS

PACKAGE = Path(__file__).parents[1] / "vera_jax"
# Words that name something else as well; they count where they are compared
# with a run's method or task.
ORDINARY = {"head", "full", "norms", "text", "images", "language"}
HOMES = {
  "method": ("adapters/", "peft_io/"),
  "family": ("models/",),
  "task": ("tasks/",),
}
# Files that are tables or interfaces, and why they name what they name.
EXCEPTIONS = {
  "__init__.py": "what a notebook imports",
  "export/gguf.py": "GGUF's names of architectures",
  "generate/beam.py": "the rules of microsoft/LoRA's script",
  "nnx/files.py": "qwix's names of LoRA's matrices",
  "nnx/twins.py": "tunix's models, by the names of their modules",
  "report/frame.py": "the methods' titles and their order in tables",
  "report/published.py": "the paper's numbers",
  "report/style.py": "a colour for each method",
  "report/table1.py": "the paper's Table 1",
  "report/words.py": "a title for each task",
}


def names():
  """Every name by its kind."""
  tasks = [importlib.import_module(f"vera_jax.tasks.{name}") for name in TASKS]
  return {
    "method": {*METHODS},
    "family": {*FAMILIES, *(m.rpartition(".")[2] for m in FAMILIES.values())},
    "task": {*TASKS, *(name for task in tasks for name in task.NAMES)},
  }


def words(text):
  """The words of a text or an identifier, joined as names are."""
  return {*re.findall(r"[a-z0-9]+(?:[_-][a-z0-9]+)*", text)}


def named(tree):
  """(line, words that may be names, whether compared with a method or task)."""
  docs = {
    id(node.body[0].value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    and isinstance(node.body[0], ast.Expr)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      if id(node) not in docs and " " not in node.value:
        yield node.lineno, words(node.value), False
    elif isinstance(node, ast.Name | ast.Attribute | ast.arg | ast.alias):
      for key in ("id", "attr", "arg", "name"):
        if isinstance(getattr(node, key, None), str):
          yield node.lineno, {getattr(node, key)}, False
    elif isinstance(node, ast.Compare):
      sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
      if any(re.search(r"\b(method|task)\b", side) for side in sides):
        texts = [x for x in ast.walk(node) if isinstance(x, ast.Constant)]
        yield node.lineno, {str(x.value) for x in texts}, True


@pytest.mark.parametrize("kind", HOMES)
def test_no_name_stands_outside_its_folder(kind):
  of_kind, wrong = names()[kind], []
  for path in sorted(PACKAGE.rglob("*.py")):
    file = path.relative_to(PACKAGE).as_posix()
    if file.startswith(HOMES[kind]) or file in EXCEPTIONS:
      continue
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, found, compared in named(tree):
      known = found & (of_kind if compared else of_kind - ORDINARY)
      wrong += [f"{file}:{line} {name}" for name in sorted(known)]
  assert not wrong, "\n".join(wrong)
