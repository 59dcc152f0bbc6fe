"""The same training on every mesh: how far the meshes are apart.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
    python -m benchmarks.meshes

Trains a small random RoBERTa (four heads, three layers, no dropout) for some
steps of two microbatches on 1, 2, 4 and 8 devices, by vera, lora and full, and
prints the largest differences of losses and of trained leaves from one device.
"""

from pathlib import Path

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.plans.equality import HEADER, METHODS, compare, rows
from benchmarks.report import write
from experiments import cli
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.results import provenance

STEPS = flags.DEFINE_integer("steps", 5, "Updates.", 1)
ONLY = flags.DEFINE_list(
  "methods",
  list(METHODS),
  "Which to train; the file keeps what it has of others.",
)
OUT = flags.DEFINE_string("out", "results/plans", "Where meshes.json goes.")


def main() -> None:
  if jax.device_count() < 8:
    raise UserError(
      f"There are {jax.device_count()} devices; eight are needed:"
      " XLA_FLAGS=--xla_force_host_platform_device_count=8"
    )
  path = Path(OUT.value) / "meshes.json"
  for method in ONLY.value:
    for name, made in compare(method, STEPS.value):
      print(method, name, made, flush=True)
      found = read_json(path)["meshes"] if path.exists() else {}
      found.setdefault(name, {})[method] = made
      result = {"steps": STEPS.value, "meshes": found, **provenance()}
      write(path.stem, result, folder=OUT.value)
  table = Table(*HEADER, title="Largest differences from one device")
  for row in rows(found):
    table.add_row(*row)
  Console().print(table)
  print(path)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
