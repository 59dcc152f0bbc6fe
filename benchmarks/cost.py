"""What a training step costs by method, from the compiled program itself.

  python -m benchmarks.cost --config=configs/minilm.py:sst2
  python -m benchmarks.cost --config=configs/minilm.py:sst2 --rows=4 \
    --config.unilora.size=7680 --out=results/benchmarks

Compiles the real step of a config for each method and prints XLA's own count
of FLOPs and of bytes moved, the step's temporary memory, and the bytes of
gradients and optimiser slots. Nothing is run or timed, so the figures repeat.
--out writes them to cost-TASK.json there, from which docs/methods.md has the
FLOPs per step.
"""

from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Column, Table

from benchmarks.report import environment, write
from experiments import cli
from experiments.plans.lowering import abstract_step, architecture
from vera_jax.adapters.methods import METHODS
from vera_jax.data.loader import PackedData
from vera_jax.models.folder import resolve
from vera_jax.pretrained.sharding import batch_shards, make_mesh
from vera_jax.tasks.task import task_for
from vera_jax.train.config import check_settings

CONFIG = cli.define_config()
ROWS = flags.DEFINE_integer("rows", 8, "Rows of the batch, as packed.")
OUT = flags.DEFINE_string("out", None, "A folder for cost-TASK.json.")
# Of what is counted: its name, how much one unit of it is, and digits.
COLUMNS = {
  "flops": ("GFLOP", 1e9, 2),
  "moved": ("GB moved", 1e9, 2),
  "temporary": ("MB temporary", 1e6, 1),
  "gradients": ("kB gradients", 1e3, 1),
  "slots": ("kB slots", 1e3, 1),
}


def main() -> None:
  table = Table(
    "method",
    *(Column(name, justify="right") for name, *_ in COLUMNS.values()),
    title=f"One step, {ROWS.value} packed rows",
  )
  config = cli.chosen(CONFIG).copy_and_resolve_references()
  check_settings(config)
  mesh = make_mesh(**config.mesh)
  data = task_for(config).load(
    config, resolve(config.model.name), shards=batch_shards(mesh)
  )
  assert isinstance(data, PackedData)
  layout, fields = data.train_layout, architecture(config)
  costs: dict[str, dict[str, float]] = {}
  for config.method in METHODS:
    step = abstract_step(config, fields, mesh)
    compiled = step.compile(ROWS.value, layout.length, layout.slots)
    count, memory = compiled.cost_analysis(), compiled.memory_analysis()
    cost = costs[config.method] = {
      "flops": count["flops"],
      "moved": count["bytes accessed"],
      "temporary": memory.temp_size_in_bytes,
      "gradients": _bytes(step.state.params),
      "slots": _bytes(step.state.opt_state),
    }
    table.add_row(
      config.method,
      *(
        f"{cost[name] / unit:,.{digits}f}"
        for name, (_, unit, digits) in COLUMNS.items()
      ),
    )
  Console().print(table)
  if OUT.value:
    result = environment("cost") | {
      "rows": ROWS.value,
      "length": layout.length,
      "methods": costs,
    }
    print(write(f"cost-{config.task}", result, folder=OUT.value))


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
