"""How a training step grows: seconds and memory against what makes it larger.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
    python -m benchmarks.step_growth

One step of VeRA (r = 256), of LoRA (r = 8) and of the frozen network, which
trains one number per output of the same layers, on an encoder of MiniLM's width
with random weights: 8 rows of 128 tokens, six layers, q and v adapted, float32.
Of rank, tokens, layers, members of an ensemble and shards one at a time grows,
the others stay. Seconds are the medians of steps that the three took by turns.
Memory is what XLA plans for one device: arguments, results and what lies
between. Shards are virtual devices, which share this machine's cores. Writes
results/benchmarks/step_growth.json, of which `benchmarks.docs` makes the table
and the figure of docs/scale.md.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.progress import track

from benchmarks.report import environment, interleaved, load, write
from configs import minilm
from experiments import cli
from experiments.markdown import markdown_table
from experiments.plans.figures import total
from experiments.plans.frozen import frozen_network
from experiments.plans.lowering import AbstractStep, abstract_step
from vera_jax.errors import UserError
from vera_jax.models.paper_sizes import roberta
from vera_jax.pretrained.sharding import make_mesh
from vera_jax.report.style import BLACK, METHOD_COLORS, STYLE, TEXT

GROWS = {
  "rank": (4, 16, 64, 256, 1024),
  "tokens": (32, 64, 128, 256, 512),
  "layers": (3, 6, 12, 24),
  "members": (1, 2, 4, 8),
  "shards": (1, 2, 4, 8),
}
HERE = {"rank": 256, "tokens": 128, "layers": 6, "members": 1, "shards": 1}
METHODS = {"vera": "VeRA", "lora": "LoRA", "frozen": "frozen network"}
LORA_RANK = 8  # where another number than the rank grows
ROWS, VOCABULARY = 8, 1000
MEASURED = {"seconds": "seconds per step", "bytes": "MB per device"}
HEADER = [
  "grows",
  *(
    f"{method}: {what}"
    for what in ("seconds", "memory")
    for method in METHODS.values()
  ),
]
Row = Mapping[str, Any]


def define_flags() -> None:
  flags.DEFINE_integer("repetitions", 5, "Steps that are timed.", 1)
  flags.DEFINE_string("out", "results/benchmarks", "Where the file goes.")


def main() -> None:
  options = flags.FLAGS
  if jax.device_count() < max(GROWS["shards"]):
    raise UserError(
      f"There are {jax.device_count()} devices; eight are needed:"
      " XLA_FLAGS=--xla_force_host_platform_device_count=8"
    )
  result = environment("step_growth")
  rows: list[Row] = []
  points = [(name, value) for name, values in GROWS.items() for value in values]
  for name, value in track(points, "steps", len(points)):
    steps, memory = {}, {}
    for method in METHODS:
      steps[method], memory[method] = prepared(method, name, value)
    seconds = interleaved(steps, repetitions=options.repetitions)
    rows += [
      {
        "grows": name,
        "to": value,
        "method": method,
        "seconds": statistics.median(seconds[method]),
        "range": [min(seconds[method]), max(seconds[method])],
        "bytes": memory[method],
      }
      for method in METHODS
    ]
  result |= {"load_after": load(), "rows": rows}
  path = write("step_growth", result, folder=options.out)
  print(markdown(result), path, sep="\n")


def prepared(
  method: str, name: str, value: int
) -> tuple[Callable[[], None], int]:
  """(takes a step that is compiled and was taken before, bytes of a device)."""
  size = {**HERE, name: value}
  shapes = step_of(method, size, rank_grows=name == "rank")
  program = shapes.compile(ROWS, size["tokens"])
  rng = np.random.default_rng(0)

  def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      keys = jax.random.split(jax.random.key(0), math.prod(leaf.shape))
      return jax.device_put(keys.reshape(leaf.shape), leaf.sharding)
    values = np.ones(leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      values = 0.05 * rng.random(leaf.shape)  # Adam's squares, too
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

  state, frozen = jax.tree.map(filled, (shapes.state, shapes.frozen))
  batch, key, rates = jax.tree.map(
    filled, shapes.arguments(ROWS, size["tokens"])
  )

  def step() -> None:
    nonlocal state
    state, metrics = program(state, frozen, [batch], key, rates)
    jax.block_until_ready(metrics)

  step()
  return step, total(program)


def step_of(
  method: str, size: Mapping[str, int], *, rank_grows: bool
) -> AbstractStep:
  """The step of MiniLM's config, on an encoder of this size."""
  config = minilm.get_config()
  config.method = "head" if method == "frozen" else method
  config.vera.rank = size["rank"]
  config.lora.rank = size["rank"] if rank_grows else LORA_RANK
  config.model.dtype = "float32"
  fields = {
    **roberta(384, size["layers"]),
    "vocab_size": VOCABULARY,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
  }
  mesh = make_mesh(1, size["shards"], over=jax.devices()[: size["shards"]])
  runs = size["members"] if size["members"] > 1 else None
  options = frozen_network(config) if method == "frozen" else {}
  return abstract_step(config, fields, mesh, runs=runs, **options)


def exponents(rows: Sequence[Row], name: str, method: str, what: str) -> str:
  """The slope of a line through the logarithms, and that of its last part."""
  chosen = [r for r in rows if (r["grows"], r["method"]) == (name, method)]
  sizes, values = (np.log([r[key] for r in chosen]) for key in ("to", what))
  slope = np.polyfit(sizes, values, 1)[0]
  last = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
  return f"{slope:.2f} ({last:.2f})"


def markdown(result: Mapping[str, Any]) -> str:
  """A line per thing that grows, with the exponents."""
  rows = result["rows"]
  lines = []
  for name in dict.fromkeys(row["grows"] for row in rows):
    values = GROWS[name]
    line = [f"{name}, {values[0]} to {values[-1]:,}"]
    for what in MEASURED:
      line += [exponents(rows, name, method, what) for method in METHODS]
    lines.append(line)
  return markdown_table(HEADER, lines)


def figure(result: Mapping[str, Any]) -> Figure:
  """Seconds above, memory below, a column per thing that grows."""
  rows = result["rows"]
  with mpl.rc_context(STYLE):
    made = Figure(figsize=(TEXT, 3.6), layout="constrained")
    axes = made.subplots(2, len(GROWS), sharey="row", sharex="col")
    for line, (what, label) in zip(axes, MEASURED.items(), strict=True):
      line[0].set_ylabel(label)
      for ax, name in zip(line, GROWS, strict=True):
        for method, xs, ys in curves(rows, name, what):
          color, marker = METHOD_COLORS.get(method, (BLACK, "D"))
          ax.plot(xs, ys, color=color, marker=marker, label=METHODS[method])
        ax.set(xscale="log", yscale="log")
        shown = GROWS[name][:: 2 if len(GROWS[name]) > 4 else 1]
        ax.set_xticks(shown, [f"{n:,}" for n in shown])
        ax.xaxis.set_minor_locator(NullLocator())
    for ax, name in zip(axes[1], GROWS, strict=True):
      ax.set_xlabel(name)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper center", ncols=len(METHODS))
  return made


def curves(
  rows: Sequence[Row], name: str, what: str
) -> Iterator[tuple[str, list[int], list[float]]]:
  """(method, sizes, seconds or megabytes)."""
  unit = 1e6 if what == "bytes" else 1
  for method in METHODS:
    chosen = [r for r in rows if (r["grows"], r["method"]) == (name, method)]
    yield method, [r["to"] for r in chosen], [r[what] / unit for r in chosen]


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
