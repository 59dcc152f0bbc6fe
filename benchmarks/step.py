"""What a training step costs, from programs that XLA compiled and nobody ran.

  python -m experiments.benchmark step
  python -m experiments.benchmark step --sizes=base --device=cpu

The real step of VeRA, in each contraction plan, and of LoRA on RoBERTa of the
paper's settings (query and value; base r = 1024, large r = 256; LoRA r = 8)
beside two steps of the network with nothing on it. One trains a number a column
of the same layers, so that the gradient takes the same way, and computes of the
last layer what the head reads, as all others do. The other has the whole last
layer, and the gradient down to the embeddings (it trains the biases).

FLOPs, bytes moved and temporary memory are XLA's own counts, for one chip of a
described TPU in bfloat16 (no TPU is needed, only `pip install libtpu`) or for
this machine's CPU in float32. FLOPs and bytes are counted as
benchmarks/plans/depth.py says; temporary memory is the scanned step's. Each
step is three programs, a minute or more on one core; what an earlier call of
the same versions has counted stays in the file, without --anew.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks import step_report
from benchmarks.plans.chips import describe_pod
from benchmarks.report import environment, write
from configs import rte
from vera_jax.files import read_json

FROZEN = "frozen network"
WHOLE = "frozen network, whole"
SIZES = "base", "large"


class Cost(NamedTuple):
  """Of one step, by XLA's count; `sent` is what several chips all-reduce."""

  flops: float
  moved: float
  temporary: int
  sent: int


def define_flags() -> None:
  flags.DEFINE_multi_enum("sizes", list(SIZES), SIZES, "Of RoBERTa.")
  flags.DEFINE_string(
    "device", "v5e:2x2", "A TPU topology, whose first chip is taken; or cpu."
  )
  flags.DEFINE_integer("length", 128, "Tokens a row.", lower_bound=8)
  flags.DEFINE_bool("anew", False, "Count again what the file has.")
  flags.DEFINE_string("out", "results/benchmarks", "Where step-*.json goes.")


def main() -> None:
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  given = flags.FLAGS
  device = _device(given.device)
  kind = given.device.partition(":")[0]
  path = Path(given.out) / f"step-{kind}.json"
  result = environment("step") | {
    "device": given.device,
    "kind": device.device_kind,
    "dtype": _dtype(device),
    "length": given.length,
    "rows": {size: _batch(size) for size in SIZES},
  }
  found = {} if given.anew else kept(path, result)
  for size in given.sizes:
    ways = dict(_ways(size))
    costs = {k: x for k, x in found.get(size, {}).items() if k in ways}
    told = f"RoBERTa-{size}"
    for name, way in track(ways.items(), description=told, total=len(ways)):
      if name not in costs:
        costs[name] = _cost(*way, given.length, device)._asdict()
        found[size] = costs
        write(path.stem, result | {"sizes": found}, folder=given.out)
    found[size] = {name: costs[name] for name in ways}
  publish(result | {"sizes": found}, path)
  for table in step_report.for_terminal(read_json(path)):
    Console().print(table)
  print(path)


def kept(path: Path, result: dict[str, Any]) -> dict[str, Any]:
  """What an earlier call has counted under the same conditions, by size."""
  if not path.exists():
    return {}
  there = read_json(path)
  same = ("versions", "device", "dtype", "length", "rows")
  if any(there.get(key) != result[key] for key in same):
    return {}
  return there["sizes"]


def publish(result: dict[str, Any], path: Path) -> None:
  """Writes the figures, their tables and the plot."""
  write(path.stem, result, folder=str(path.parent))
  page = step_report.markdown(result)
  path.with_suffix(".md").write_text(page, encoding="utf-8")
  step_report.draw(result, path.with_suffix(".png"))


def _batch(size: str) -> int:
  return rte.get_config(size).optim.batch_size


def _dtype(device: Any) -> str:
  return "float32" if device.platform == "cpu" else "bfloat16"


def _device(name: str) -> Any:
  """The CPU, or the first chip of a described topology."""
  import jax

  if name == "cpu":
    return jax.devices("cpu")[0]
  return describe_pod(name).devices[0]


def _ways(size: str) -> Iterator[tuple[str, tuple[Any, Any, bool]]]:
  """(name, (config, an adapter of no method, whether to read everywhere))."""
  from vera_jax.adapters.products import PLANS

  def config(method: str, plan: str = "auto") -> Any:
    made = rte.get_config(size)
    made.method, made.model.contraction, made.model.scan = method, plan, True
    return made

  vera, lora = (config(method) for method in ("vera", "lora"))
  nothing = frozen_network(), tuple(vera.vera.targets)
  yield FROZEN, (config("head"), nothing, False)
  yield WHOLE, (config("bitfit"), None, True)
  for plan in PLANS:
    yield (
      f"vera r={vera.vera.rank}, {plan}",
      (config("vera", plan), None, False),
    )
  yield f"lora r={lora.lora.rank}", (lora, None, False)


def frozen_network() -> Any:
  """An adapter that adds one number a column, for which x's gradient is not
  needed but that of the layer's output is."""
  import jax.numpy as jnp

  from vera_jax.adapters.interface import Adapter

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


def _cost(
  config: Any, adapter: Any, whole: bool, length: int, device: Any
) -> Cost:
  from benchmarks.plans.depth import counts
  from benchmarks.plans.lowering import architecture, step_of
  from vera_jax.train.model import compute_dtype
  from vera_jax.train.sharding import make_mesh

  dtype, mesh = compute_dtype(_dtype(device)), make_mesh(over=[device])

  def step(config: Any, fields: Any) -> Any:
    return step_of(config, fields, mesh, dtype, adapter=adapter)

  def compiled(config: Any, fields: Any) -> Any:
    return step(config, fields).compile(rows, length, read)

  fields, rows = architecture(config), config.optim.batch_size
  read = length if whole else 1  # positions a row, that the head reads
  memory = compiled(config, fields).memory_analysis()
  numbers = step(config, fields).model.counts
  found = counts(config, fields, compiled)
  # The head is trained, so that each of its products is three; those at
  # positions that are only read for the last layer's sake don't count.
  width, labels = fields.hidden_size, 2
  found["flops"] -= 3 * 2 * rows * (read - 1) * width * (width + labels)
  return Cost(
    **found,
    temporary=memory.temp_size_in_bytes,
    sent=4 * (numbers.adapter + numbers.head + 1),  # and the loss
  )
