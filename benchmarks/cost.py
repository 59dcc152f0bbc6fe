"""What a training step costs by method, from the compiled program itself.

  python -m benchmarks.cost --config=configs/minilm.py:sst2

Compiles the real step of a config for each method and prints XLA's own count
of FLOPs and of bytes moved, the step's temporary memory, and the bytes of
gradients and optimiser slots. Nothing is run or timed, so the figures repeat.
"""

from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Column, Table

from benchmarks.plans.lowering import abstract_step, architecture
from experiments import cli
from vera_jax.adapters.methods import METHODS
from vera_jax.hub import resolve
from vera_jax.tasks.task import task_for
from vera_jax.train.config import check_settings
from vera_jax.train.sharding import batch_shards, make_mesh

CONFIG = cli.define_config()
ROWS = flags.DEFINE_integer("rows", 8, "Rows of the batch, as packed.")
COLUMNS = ("GFLOP", "GB moved", "MB temporary", "kB gradients", "kB slots")


def main() -> None:
  table = Table(
    "method",
    *(Column(name, justify="right") for name in COLUMNS),
    title=f"One step, {ROWS.value} packed rows",
  )
  config = cli.chosen(CONFIG).copy_and_resolve_references()
  check_settings(config)
  mesh = make_mesh(**config.mesh)
  data = task_for(config).load_data(
    config, resolve(config.model.name), shards=batch_shards(mesh)
  )
  layout, fields = data.train_layout, architecture(config)
  for config.method in METHODS:
    step = abstract_step(config, fields, mesh)
    compiled = step.compile(ROWS.value, layout.length, layout.slots)
    count, memory = compiled.cost_analysis(), compiled.memory_analysis()
    table.add_row(
      config.method,
      f"{count['flops'] / 1e9:.2f}",
      f"{count['bytes accessed'] / 1e9:.2f}",
      f"{memory.temp_size_in_bytes / 1e6:.1f}",
      f"{_bytes(step.state.params) / 1e3:,.1f}",
      f"{_bytes(step.state.opt_state) / 1e3:,.1f}",
    )
  Console().print(table)


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
