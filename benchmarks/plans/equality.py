"""How far training on a mesh is from training on one device.

A small random RoBERTa (four heads, three layers, dropout 0.1) takes some steps
of two passes on 1, 2, 4 and 8 devices.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from rich.table import Table

from benchmarks.plans.lowering import step_of
from configs import common
from vera_jax.models.bert import BertConfig
from vera_jax.models.roberta import roberta
from vera_jax.train.sharding import AXES, make_mesh

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


def config_of(method: str) -> ConfigDict:
  config = common.get_config()
  config.task, config.method = "rte", method
  config.vera.rank, config.model.contraction = 32, "auto"
  config.vera.lr = config.vera.head_lr = 1e-2
  return config


def fields() -> BertConfig:
  small = {"vocab_size": 96, "num_attention_heads": 4, "intermediate_size": 64}
  return BertConfig.from_dict({**roberta(32, 3), **small})


def train(method: str, sizes: tuple[int, ...], steps: int) -> tuple[Any, Any]:
  """(losses, trained leaves) on the first devices, from fixed values."""
  mesh = make_mesh(*sizes, over=jax.devices()[: int(np.prod(sizes))])
  step = step_of(config_of(method), fields(), mesh, jnp.dtype("float32"))
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> Any:
    whole = jnp.issubdtype(leaf.dtype, jnp.integer)
    scale = path[-1].key == "scale"
    value = 0.2 * rng.standard_normal(leaf.shape) + scale
    value = np.zeros(leaf.shape) if whole else value
    return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

  def zeros(tree: Any) -> Any:
    return jax.tree.map(
      lambda leaf: jax.device_put(
        np.zeros(leaf.shape, leaf.dtype), leaf.sharding
      ),
      tree,
    )

  state = step.state._replace(
    step=zeros(step.state.step),
    params=jax.tree_util.tree_map_with_path(draw, step.state.params),
    opt_state=zeros(step.state.opt_state),
  )
  frozen = jax.tree_util.tree_map_with_path(draw, step.model.frozen._asdict())
  frozen = type(step.model.frozen)(**frozen)
  losses = []
  for number in range(steps):
    sums = zeros(step.sums)
    for last in (False, True):
      state, sums, told = step.function(
        state,
        sums,
        frozen,
        _batch(2 * number + last),
        np.bool_(last),
        jax.random.key(1),
        {name: np.float32(rate) for name, rate in RATES.items()},
      )
    losses.append(float(told["loss"]))
  return np.array(losses), jax.tree.map(np.asarray, state.params)


def _batch(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  half = LENGTH // 2
  places = np.tile(np.arange(half), (ROWS, 2))
  whole = {
    "input_ids": rng.integers(3, 96, (ROWS, LENGTH)),
    "token_type_ids": np.zeros((ROWS, LENGTH)),
    "positions": places,
    "segment_ids": np.tile(np.repeat([1, 2], half), (ROWS, 1)),
    "cls_positions": np.tile([0, half], (ROWS, 1)),
    "labels": rng.integers(0, 2, (ROWS, SLOTS)),
  }
  batch = {name: array.astype(np.int32) for name, array in whole.items()}
  weights = np.full((ROWS, SLOTS), 1 / (2 * ROWS * SLOTS), np.float32)
  return {**batch, "weights": weights}


def apart(one: Any, other: Any) -> dict[str, float]:
  """Largest differences, but for the keys' biases.

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
  named = zip(AXES, sizes, strict=True)
  return ", ".join(f"{axis}={size}" for axis, size in named if size > 1)


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
  """A mesh and its differences, as text; "-" was not measured."""
  for name in [*map(name_of, SPLITS), MOVED]:
    made = found.get(name, {})
    yield [
      name,
      *(
        f"{made[m][k]:.1e}" if m in made else "-"
        for m in METHODS
        for k in ("loss", "leaves")
      ),
    ]


def table(found: dict[str, Any]) -> Table:
  table = Table(title="Largest differences from one device")
  for name in HEADER:
    table.add_column(name)
  for texts in rows(found):
    table.add_row(*texts)
  return table


def markdown(result: dict[str, Any]) -> str:
  """The table as docs/meshes.md has it."""
  lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1)]
  lines += list(rows(result["meshes"]))
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
