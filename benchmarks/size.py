"""How large the package is: its core, and its extensions one by one.

  python -m benchmarks.size

Counts statements, as Python's parser does (an import, a docstring and the field
of a class count as one each), and names the core's files that import a part:
without any it can be deleted with its lines in the tables. Prints the table of
CONTRIBUTING.md.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from experiments import cli
from experiments.markdown import markdown_table

PACKAGE = Path("vera_jax")
CORE = "core"
TABLES = (
  "__init__.py",
  "adapters/methods.py",
  "adapters/table.py",
)  # may name any part
# A file belongs to the first part of which a pattern matches; others are core.
PARTS = {
  "kinds of layers beside Dense": ("adapters/kinds/*",),
  "methods beside VeRA and LoRA": tuple(
    f"adapters/{name}.py"
    for name in (
      *("base_leaves", "chain", "ia3", "magnitude", "pvera"),
      *("randlora", "unilora", "lora_xs", "tied_lora"),
    )
  ),
  "examples of other networks": ("models/other_networks/*",),
  "GGUF": ("models/gguf_*.py", "operations/gguf_codes.py", "export/gguf.py"),
  "images": (
    *("models/vision.py", "models/vit.py", "models/dinov2.py"),
    *("data/image*.py", "tasks/images.py", "serve/image_predictor.py"),
    *("train/ridge.py", "report/pictures.py"),
  ),
  "decoders and what they write": (
    *("models/decoder.py", "models/gpt2.py", "models/llama.py"),
    "models/gemma3.py",
    *("generate/*", "tasks/e2e*.py", "tasks/instruct*.py"),
    *("tasks/language*.py", "data/chat*.py", "data/answers.py"),
    *("data/completions.py", "data/templates.py", "data/preview.py"),
    *("data/long_rows.py", "data/written.py", "serve/questions.py"),
  ),
  "PEFT's format": ("peft_io/*",),
  "whole models as files": ("export/*",),
  "many adapters in one batch": (
    *("serve/bank.py", "serve/row*.py", "train/multi_adapter.py"),
    *("serve/http.py", "serve/bodies.py"),
  ),
  "answers to texts": ("serve/*",),
  "models of flax.nnx": ("nnx/*",),
  "sweeps": ("sweep/*",),
  "several hosts": ("train/distributed.py", "train/peers.py"),
  "object stores": ("places.py",),
  "speed and traces": tuple(
    f"train/{name}.py" for name in ("clock", "flops", "profile")
  ),
  "reports": ("report/*",),
  "uploads": ("adapters/push.py",),
}


def part_of(file: str) -> str:
  """The part of the package that a file belongs to."""
  for part, patterns in PARTS.items():
    if any(fnmatch(file, pattern) for pattern in patterns):
      return part
  return CORE


def imported(tree: ast.Module) -> Iterator[str]:
  """The package's files that a file imports, perhaps with some that aren't."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
      for module in (node.module, *names):
        yield module.removeprefix("vera_jax.").replace(".", "/") + ".py"


def main() -> None:
  sizes, users = Counter[str](), defaultdict[str, set[str]](set)
  for path in sorted(PACKAGE.rglob("*.py")):
    file = path.relative_to(PACKAGE).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree)
    sizes[part_of(file)] += sum(isinstance(node, ast.stmt) for node in nodes)
    if part_of(file) == CORE and file not in TABLES:
      for other in imported(tree):
        users[part_of(other)].add(file)
  rows = [(CORE, f"{sizes[CORE]:,}", "")]
  for part in PARTS:
    names = ", ".join(f"`{file}`" for file in sorted(users[part]))
    rows.append((part, f"{sizes[part]:,}", names))
  rows.append(("all", f"{sizes.total():,}", ""))
  header = ("part", "statements", "imported in the core by")
  print(markdown_table(header, rows, texts=3))


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
