"""docs/private_names.md lists what may go with any release of jax or flax."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "vera_jax", "experiments", "benchmarks", "examples"
PRIVATE = re.compile(
  r"(jax|jaxlib|flax|optax|orbax|qwix|tunix|transformers)\.(\w+\.)*_[a-z]"
  r"|jax\.(core|interpreters|lib)\.\w"
  r"|jaxlib\.\w"
  # what a module of flax has for itself; these two are exported as wholes
  r"|flax\.(core|linen|nnx)\.(?!meta\.|initializers\.)[a-z_]+\.\w"
)


def names(source: str) -> Iterator[str]:
  """The private names that a module imports, or reaches by their dots."""
  imported = {}
  tree = ast.parse(source)
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for name in node.names:
        imported[name.asname or name.name.partition(".")[0]] = (
          name.name if name.asname else name.name.partition(".")[0]
        )
    elif isinstance(node, ast.ImportFrom) and not node.level:
      for name in node.names:
        imported[name.asname or name.name] = f"{node.module}.{name.name}"
  chains = map(dotted, filter(ast.Attribute.__instancecheck__, ast.walk(tree)))
  uses = [chain.partition(".") for chain in chains if chain]
  reached = [imported[a] + dot + rest for a, dot, rest in uses if a in imported]
  for name in {*imported.values(), *reached}:
    if PRIVATE.match(name):
      yield name


def dotted(node: ast.AST) -> str:
  if isinstance(node, ast.Attribute):
    return f"{start}.{node.attr}" if (start := dotted(node.value)) else ""
  return node.id if isinstance(node, ast.Name) else ""


def test_the_list_is_complete_and_holds_nothing_else():
  page = (ROOT / "docs/private_names.md").read_text()
  rows = re.findall(r"^\| `([\w.]+)` \| `([\w./]+)` \|", page, re.MULTILINE)
  used = {
    (name, file.relative_to(ROOT).as_posix())
    for folder in FOLDERS
    for file in ROOT.glob(f"{folder}/**/*.py")
    for name in names(file.read_text())
  }
  assert used == {*rows}


@pytest.mark.parametrize(
  "line",
  [
    "from jax._src.distributed import global_state",
    "import jax\nx = jax.core.Tracer",
    "import jax as j\nx = j.interpreters.xla",
    "from flax.core import scope as s\nx = s.in_filter",
    "import flax.linen as nn\nx = nn.module._context",
  ],
)
def test_a_private_name_is_seen(line):
  assert [*names(line)]
