"""What a training step costs, from programs that XLA compiled and nobody ran.

  python -m experiments.benchmark step
  python -m experiments.benchmark step --sizes=base --device=cpu

The real step of VeRA, in each contraction plan, and of LoRA on RoBERTa of the
paper's settings (query and value; base r = 1024, large r = 256; LoRA r = 8)
beside the frozen network with nothing on it: that step trains a number a
column of the same layers, so that the gradient takes the same way. FLOPs, bytes
moved and temporary memory are XLA's own counts, for one chip of a described TPU
(no TPU is needed, only `pip install libtpu`) or for this machine's CPU.

XLA counts a loop's body once, whatever the turns. So FLOPs and bytes are those
of two layers, unrolled, plus as often as there are further layers what a third
one adds. Temporary memory is that of the whole depth, with the layers scanned.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.benchmarks.report import environment, write
from experiments.plans.chips import describe_pod
from vera_jax.models.roberta import roberta

FROZEN = "frozen network"
SHALLOW, DEEPER = 2, 3  # layers of the unrolled programs
SIZES = {
  "base": {"width": 768, "layers": 12, "rank": 1024, "rows": 64},
  "large": {"width": 1024, "layers": 24, "rank": 256, "rows": 32},
}


class Cost(NamedTuple):
  """Of one step, by XLA's count."""

  flops: float
  moved: float
  temporary: int


def define_flags() -> None:
  flags.DEFINE_multi_enum("sizes", list(SIZES), list(SIZES), "Of RoBERTa.")
  flags.DEFINE_string(
    "device", "v5e:2x2", "A TPU topology, whose first chip is taken; or cpu."
  )
  flags.DEFINE_integer("length", 128, "Tokens a row.", lower_bound=8)
  flags.DEFINE_string("out", "results/benchmarks", "Where step-*.json goes.")


def main() -> None:
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  given = flags.FLAGS
  result = environment("step")
  device = _device(given.device)
  result |= {"device": given.device, "length": given.length, "sizes": {}}
  for size in given.sizes:
    costs = _costs(size, given.length, device)
    result["sizes"][size] = {k: cost._asdict() for k, cost in costs.items()}
    Console().print(_table(size, costs))
  kind = given.device.partition(":")[0]
  print(write(f"step-{kind}", result, folder=given.out))


def _device(name: str) -> Any:
  """The CPU, or the first chip of a described topology."""
  import jax

  if name == "cpu":
    return jax.devices("cpu")[0]
  return describe_pod(name).devices[0]


def _costs(size: str, length: int, device: Any) -> dict[str, Cost]:
  ways = dict(_ways(SIZES[size]["rank"]))
  told = f"RoBERTa-{size}"
  return {
    name: _cost(way, SIZES[size], length, device)
    for name, way in track(ways.items(), description=told, total=len(ways))
  }


def _ways(rank: int) -> Iterator[tuple[str, Any]]:
  """What is put on the network, by name."""
  from vera_jax.contraction import PLANS
  from vera_jax.lora import lora
  from vera_jax.vera import vera

  yield FROZEN, _nothing()
  for plan in PLANS:
    yield f"vera r={rank}, {plan}", vera(rank, plan=plan)
  yield "lora r=8", lora(8)


def _nothing() -> Any:
  """An adapter that adds one number a column, for which x's gradient is not
  needed but that of the layer's output is."""
  import jax.numpy as jnp

  from vera_jax.adapter import Adapter

  return Adapter(
    name="nothing",
    projections=lambda targets: {},
    init=lambda i, o: {"nothing": lambda key: jnp.zeros(o, jnp.float32)},
    forward=lambda leaves, _, x, kernel, *, outputs: (
      x @ kernel
      + leaves["nothing"].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    ),
    kernel=lambda leaves, _, *, inputs, outputs: jnp.zeros((inputs, outputs)),
    plan=lambda tokens, inputs, outputs: "factored",
  )


def _cost(way: Any, size: dict[str, int], length: int, device: Any) -> Cost:
  compiled = partial(_compile, way, size, length, device)
  two, three = (compiled(n, scan=False) for n in (SHALLOW, DEEPER))
  more = size["layers"] - SHALLOW
  counted = [program.cost_analysis() for program in (two, three)]

  def total(name: str) -> float:
    first, second = (count[name] for count in counted)
    return first + more * (second - first)

  memory = compiled(size["layers"], scan=True).memory_analysis()
  return Cost(
    flops=total("flops"),
    moved=total("bytes accessed"),
    temporary=memory.temp_size_in_bytes,
  )


def _compile(
  way: Any,
  size: dict[str, int],
  length: int,
  device: Any,
  layers: int,
  *,
  scan: bool,
) -> Any:
  """The step's program; of weights there are shapes only."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import SingleDeviceSharding

  from vera_jax.apply import adapt
  from vera_jax.labels import label_tree, split
  from vera_jax.models.bert import BertClassifier, BertConfig, input_shapes
  from vera_jax.train.optim import optimiser
  from vera_jax.train.step import (
    Frozen,
    State,
    no_sums,
    pass_shapes,
    train_pass,
  )

  dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
  base = BertClassifier(
    BertConfig.from_dict(roberta(size["width"], layers)),
    2,
    dtype=dtype,
    param_dtype=dtype,
    scan=scan,
  )
  module = adapt(base, way, targets=["query", "value"])
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), **input_shapes(1, 8, 1)
  )
  params = shapes["params"]
  labels = label_tree(params, "head", new=_added(params, way.name))
  trained, frozen = split(params, labels)
  tx = optimiser(
    split(labels, labels)[0], adapter_lr=1e-3, head_lr=1e-3, steps=1000
  )
  trained = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), trained
  )
  state = jax.eval_shape(
    lambda params: State(jnp.int32(0), params, tx.init(params)), trained
  )
  arguments = (
    state,
    jax.eval_shape(no_sums, trained),
    Frozen(frozen, shapes.get("projections", {})),
    pass_shapes(size["rows"], length, 1),
    jax.ShapeDtypeStruct((), jnp.bool_),
    jax.eval_shape(lambda: jax.random.key(0)),
  )
  place = SingleDeviceSharding(device)
  placed = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    arguments,
  )
  step = partial(train_pass, apply=module.apply, tx=tx)
  return jax.jit(step, donate_argnums=(0, 1)).lower(*placed).compile()


def _added(params: Any, name: str) -> list[tuple[str, ...]]:
  """The paths of an adapter's leaves."""
  from flax.traverse_util import flatten_dict

  return [p for p in flatten_dict(params) if p[-1].startswith(name)]


def _table(size: str, costs: dict[str, Cost]) -> Table:
  settings = SIZES[size]
  table = Table(
    title=f"RoBERTa-{size}, {settings['rows']} rows, one step",
  )
  table.add_column("trained")
  for name in ("TFLOP", "against frozen", "GB moved", "MB temporary"):
    table.add_column(name, justify="right")
  for name, cost in costs.items():
    table.add_row(
      name,
      f"{cost.flops / 1e12:.3f}",
      f"{cost.flops / costs[FROZEN].flops:.3f}",
      f"{cost.moved / 1e9:.2f}",
      f"{cost.temporary / 1e6:,.0f}",
    )
  return table
