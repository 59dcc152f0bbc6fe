"""The same training on every mesh: how far the meshes are apart.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
    python -m benchmarks.meshes

Trains a small random RoBERTa (four heads, three layers) for some steps of two
microbatches on 1, 2, 4 and 8 devices, by vera, lora and full, and prints the
largest differences of losses and of trained leaves from one device. Dropout is
off, since its masks depend on the mesh.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from benchmarks.report import write
from configs import common
from experiments import cli
from experiments.markdown import markdown_table
from experiments.plans.lowering import abstract_step
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.models.paper_sizes import roberta
from vera_jax.pretrained.sharding import AXES, make_mesh
from vera_jax.results import provenance

SPLITS = (
  (2, 1, 1),
  (1, 2, 1),
  (1, 1, 2),
  (4, 1, 1),
  (2, 2, 1),
  (1, 2, 2),
  (8, 1, 1),
  (2, 4, 1),
  (2, 1, 4),
  (2, 2, 2),
)
METHODS = ("vera", "lora", "full")
HEADER = [
  "mesh",
  *(f"{m}: {what}" for m in METHODS for what in ("losses", "leaves")),
]
MOVED = "first step to last, one device"
ROWS, LENGTH, SLOTS = 8, 16, 2
RATES = {"adapter_lr": 1e-2, "head_lr": 1e-2, "weight_decay": 0.0}
FIELDS = {
  **roberta(32, 3),
  "vocab_size": 96,
  "num_attention_heads": 4,
  "intermediate_size": 64,
  "hidden_dropout_prob": 0.0,
  "attention_probs_dropout_prob": 0.0,
}


def define_flags() -> None:
  flags.DEFINE_integer("steps", 5, "Updates.", 1)
  flags.DEFINE_list(
    "methods",
    list(METHODS),
    "Which to train; the file keeps what it has of others.",
  )
  flags.DEFINE_string("out", "results/plans", "Where meshes.json goes.")


def main() -> None:
  if jax.device_count() < 8:
    raise UserError(
      f"There are {jax.device_count()} devices; eight are needed:"
      " XLA_FLAGS=--xla_force_host_platform_device_count=8"
    )
  options = flags.FLAGS
  path = Path(options.out) / "meshes.json"
  for method in options.methods:
    for name, made in compare(method, options.steps):
      print(method, name, made, flush=True)
      meshes = read_json(path)["meshes"] if path.exists() else {}
      meshes.setdefault(name, {})[method] = made
      result = {"steps": options.steps, "meshes": meshes, **provenance()}
      write(path.stem, result, folder=options.out)
  table = Table(*HEADER, title="Largest differences from one device")
  for row in rows(meshes):
    table.add_row(*row)
  Console().print(table)
  print(path)


def config_of(method: str) -> ConfigDict:
  """A method's config at a small rank, whatever the machine in float32."""
  config = common.get_config()
  config.task, config.method = "rte", method
  config.vera.rank, config.model.dtype = 32, "float32"
  config.vera.lr = config.vera.head_lr = config.head.head_lr = 1e-2
  return config


def train(method: str, sizes: tuple[int, ...], steps: int) -> tuple[Any, Any]:
  """(losses, trained leaves) on the first devices, from fixed values."""
  mesh = make_mesh(*sizes, over=jax.devices()[: int(np.prod(sizes))])
  shapes = abstract_step(config_of(method), FIELDS, mesh)
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> jax.Array:
    value = 0.2 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
    return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

  def zeros(leaf: Any) -> jax.Array:
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

  state = jax.tree.map(zeros, shapes.state)
  params = jax.tree_util.tree_map_with_path(draw, shapes.state.params)
  state = state._replace(params=params)
  frozen = jax.tree_util.tree_map_with_path(draw, shapes.frozen)
  rates = {name: jnp.float32(rate) for name, rate in RATES.items()}
  losses = []
  for step in range(steps):
    microbatches = [_batch(2 * step), _batch(2 * step + 1)]
    key = jax.random.key(1)
    state, metrics = shapes.step(state, frozen, microbatches, key, rates)
    losses.append(float(metrics["loss"]))
  return np.array(losses), jax.tree.map(np.asarray, state.params)


def _batch(seed: int) -> dict[str, Any]:
  """Rows of two examples each."""
  rng = np.random.default_rng(seed)
  half = LENGTH // 2
  batch = {
    "input_ids": rng.integers(3, 96, (ROWS, LENGTH)),
    "token_type_ids": np.zeros((ROWS, LENGTH)),
    "positions": np.tile(np.arange(half), (ROWS, 2)),
    "segment_ids": np.tile(np.repeat([1, 2], half), (ROWS, 1)),
    "cls_positions": np.tile([0, half], (ROWS, 1)),
    "labels": rng.integers(0, 2, (ROWS, SLOTS)),
  }
  batch = {name: array.astype(np.int32) for name, array in batch.items()}
  return {**batch, "weights": np.ones((ROWS, SLOTS), np.float32)}


def apart(one: Any, other: Any) -> dict[str, float]:
  """Largest differences of losses and of leaves, without the keys' biases.

  Softmax cancels these: their gradient is nothing but rounding, of which AdamW
  makes steps of full length.
  """
  first, second = (flatten_dict(run[1]) for run in (one, other))
  leaves = [
    float(np.abs(leaf - second[path]).max())
    for path, leaf in first.items()
    if path[-2:] != ("key", "bias")
  ]
  return {"loss": float(np.abs(one[0] - other[0]).max()), "leaves": max(leaves)}


def compare(method: str, steps: int) -> Iterator[tuple[str, dict[str, float]]]:
  """How far the steps go, and how far each mesh is from one device."""
  alone, first = (train(method, (1, 1, 1), count) for count in (steps, 1))
  ends = np.array([first[0][0], alone[0][-1]])
  yield MOVED, apart((ends[:1], first[1]), (ends[1:], alone[1]))
  for sizes in SPLITS:
    yield name_of(sizes), apart(train(method, sizes, steps), alone)


def name_of(sizes: tuple[int, ...]) -> str:
  named = zip(AXES[1:], sizes, strict=True)
  return ", ".join(f"{axis}={size}" for axis, size in named if size > 1)


def rows(meshes: dict[str, Any]) -> Iterator[list[str]]:
  """A mesh and its differences, as text; "-" was not measured."""
  for name in [*map(name_of, SPLITS), MOVED]:
    row = [name]
    for method in METHODS:
      measured = meshes.get(name, {}).get(method)
      for kind in ("loss", "leaves"):
        row.append(f"{measured[kind]:.1e}" if measured else "-")
    yield row


def markdown(result: dict[str, Any]) -> str:
  """The table as docs/meshes.md has it."""
  return markdown_table(HEADER, rows(result["meshes"]))


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
