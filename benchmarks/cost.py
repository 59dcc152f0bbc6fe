"""What a training step costs by method, from the compiled program itself.

  python -m benchmarks.cost --config=configs/minilm.py:sst2

Compiles the real step of a config for each method and prints XLA's own count
of FLOPs and of bytes moved, the step's temporary memory, and the bytes of
gradients and optimiser slots. Nothing is run or timed, so figures repeat.
"""

from typing import Any, NamedTuple

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from vera_jax.adapters.labels import TRAINED
from vera_jax.train.model import init_state
from vera_jax.train.run import Run, build_run
from vera_jax.train.step import jit_no_sums, jit_train_pass, pass_shapes

CONFIG = cli.define_config()
ROWS = flags.DEFINE_integer("rows", 8, "Rows of the batch, as packed.")


class Cost(NamedTuple):
  """Of one step: FLOPs, bytes moved, and bytes held by kind."""

  flops: float
  moved: float
  temporary: int
  gradients: int
  slots: int


def _bytes(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def step_cost(run: Run, rows: int) -> Cost:
  """The cost of one training step on `rows` full rows."""
  layout = run.data.train_layout
  batch = pass_shapes(rows, layout.length, layout.slots)
  state = init_state(run.model, run.tx, run.mesh)
  step = jit_train_pass(state, apply=run.model.module.apply, tx=run.tx)
  sums, key = jit_no_sums(state)(state.params), jax.random.key(0)
  arguments = (state, sums, run.model.frozen, batch, True, key)
  compiled: Any = step.lower(*arguments).compile()
  counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
  assert counted is not None and memory is not None
  return Cost(
    flops=counted["flops"],
    moved=counted["bytes accessed"],
    temporary=memory.temp_size_in_bytes,
    gradients=_bytes(state.params),
    slots=_bytes(state.opt_state),
  )


def main() -> None:
  table = Table(title=f"One step, {ROWS.value} packed rows")
  table.add_column("method")
  for name in ("GFLOP", "GB moved", "MB temporary", "kB gradients", "kB slots"):
    table.add_column(name, justify="right")
  for method in TRAINED:
    config = cli.chosen(CONFIG).copy_and_resolve_references()
    config.method = method
    cost = step_cost(build_run(config), ROWS.value)
    table.add_row(
      method,
      f"{cost.flops / 1e9:.2f}",
      f"{cost.moved / 1e9:.2f}",
      f"{cost.temporary / 1e6:.1f}",
      f"{cost.gradients / 1e3:,.1f}",
      f"{cost.slots / 1e3:,.1f}",
    )
  Console().print(table)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
