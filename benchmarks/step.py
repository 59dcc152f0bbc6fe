"""What a training step costs, from programs that XLA compiled and nobody ran.

  python -m benchmarks.step
  python -m benchmarks.step --sizes=base --device=cpu

The real step of VeRA, in each contraction plan, and of LoRA on RoBERTa at the
paper's settings (query and value; base r = 1024, large r = 256; LoRA r = 8)
beside two steps of the network with no method on it. One trains one number per
output of the same layers, so that the gradient goes through the same layers,
and computes of the last layer what the head reads, as all others do. The other
has the whole last layer, and the gradient down to the embeddings (it trains the
biases).

FLOPs, bytes moved and temporary memory are XLA's own counts, for one chip of a
described TPU in bfloat16 (no TPU is needed, only `pip install libtpu`) or for
this machine's CPU in float32. FLOPs and bytes are counted as
experiments/plans/depth.py says; temporary memory is the scanned step's. Each
step takes three programs, a minute or more on one core. What an earlier call of
the same versions has counted stays in the file; --anew counts it again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict
from rich.progress import track

from benchmarks.report import environment, write
from configs import rte
from experiments import cli
from experiments.markdown import markdown_table
from experiments.plans.chips import device_named, use_no_accelerator
from experiments.plans.depth import counts
from experiments.plans.frozen import column_bias
from experiments.plans.lowering import (
  AbstractStep,
  abstract_step,
  architecture,
)
from vera_jax.adapters.interface import PLANS, Adapter
from vera_jax.files import read_json
from vera_jax.pretrained.sharding import make_mesh

FROZEN = "frozen network"
WHOLE = "frozen network, whole"
SIZES = "base", "large"
COLUMNS = (
  "on the network",
  "TFLOP",
  "against frozen",
  "against it, whole",
  "GB moved",
  "MB temporary",
  "MB all-reduced",
)


class Variant(NamedTuple):
  """A step to count.

  Attributes:
    config: a run's.
    adapter: in place of the config's method; and the targets that it is on.
    reads_all: whether the head reads every position, so that the last layer is
      computed for all of them.
  """

  config: ConfigDict
  adapter: tuple[Adapter, tuple[str, ...]] | None = None
  reads_all: bool = False


def define_flags() -> None:
  flags.DEFINE_multi_enum("sizes", list(SIZES), SIZES, "Of RoBERTa.")
  flags.DEFINE_string(
    "device", "v5e:2x2", "A TPU topology, whose first chip is taken; or cpu."
  )
  flags.DEFINE_integer("length", 128, "Tokens per row.", lower_bound=8)
  flags.DEFINE_bool("anew", False, "Count again what the file has.")
  flags.DEFINE_string("out", "results/benchmarks", "Where step-*.json goes.")


def main() -> None:
  use_no_accelerator()
  options = flags.FLAGS
  device = device_named(options.device)
  path = Path(options.out) / f"step-{options.device.partition(':')[0]}.json"
  result = environment("step") | {
    "device": options.device,
    "kind": device.device_kind,
    "dtype": "float32" if device.platform == "cpu" else "bfloat16",
    "length": options.length,
    "rows": {size: rte.get_config(size).optim.batch_size for size in SIZES},
  }
  counted = {} if options.anew else kept(path, result)
  for size in options.sizes:
    chosen = dict(variants(size))
    costs = {k: x for k, x in counted.get(size, {}).items() if k in chosen}
    for name, variant in track(chosen.items(), f"RoBERTa-{size}", len(chosen)):
      if name not in costs:
        costs[name] = cost(
          variant, length=options.length, device=device, dtype=result["dtype"]
        )
        counted[size] = costs
        write(path.stem, result | {"sizes": counted}, folder=options.out)
    counted[size] = {name: costs[name] for name in chosen}
  result["sizes"] = counted
  write(path.stem, result, folder=options.out)
  page = markdown(result)
  path.with_suffix(".md").write_text(page, encoding="utf-8")
  print(f"{page}\n{path}")


def kept(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
  """What an earlier call has counted under the same conditions, by size."""
  if not path.exists():
    return {}
  there = read_json(path)
  same = ("versions", "device", "dtype", "length", "rows")
  if any(there.get(key) != result[key] for key in same):
    return {}
  return there["sizes"]


def variants(size: str) -> Iterator[tuple[str, Variant]]:
  """(name, what to count) for RoBERTa-base or -large."""

  def config(method: str, plan: str = "auto") -> ConfigDict:
    made = rte.get_config(size)
    made.method, made.model.contraction, made.model.scan = method, plan, True
    return made

  vera, lora = (config(method) for method in ("vera", "lora"))
  targets = tuple(vera.vera.targets)
  yield FROZEN, Variant(config("head"), (column_bias(), targets))
  yield WHOLE, Variant(config("bitfit"), reads_all=True)
  for plan in PLANS:
    yield f"vera r={vera.vera.rank}, {plan}", Variant(config("vera", plan))
  yield f"lora r={lora.lora.rank}", Variant(lora)


def cost(
  variant: Variant, *, length: int, device: Any, dtype: str
) -> dict[str, Any]:
  """XLA's counts of one step; "sent" is what several chips all-reduce, in
  bytes, and "temporary" and "moved" are bytes too."""
  config, mesh = variant.config, make_mesh(over=[device])
  fields, rows = architecture(config), config.optim.batch_size
  read = (
    length if variant.reads_all else 1
  )  # positions per row that the head reads

  def step(config: ConfigDict, fields: Mapping[str, Any]) -> AbstractStep:
    options: dict[str, Any] = {"dtype": jnp.dtype(dtype)}
    if variant.adapter is not None:
      options["adapter"] = variant.adapter
    return abstract_step(config, fields, mesh, **options)

  real = step(config, fields)
  memory = real.compile(rows, length, read).memory_analysis()
  counted = counts(
    config, fields, lambda *args: step(*args).compile(rows, length, read)
  )
  # The head is trained, so that each of its products counts three times; those
  # at positions that are only read for the last layer's sake are left out.
  width, labels = fields["hidden_size"], 2
  counted["flops"] -= 3 * 2 * rows * (read - 1) * width * (width + labels)
  numbers = real.model.counts
  return {
    **counted,
    "temporary": memory.temp_size_in_bytes,
    # with the loss and the number of examples
    "sent": 4 * (numbers.adapter + numbers.head + 2),
  }


def markdown(result: Mapping[str, Any]) -> str:
  """One table per size, and what the columns mean."""
  parts = ["# What a step costs, as XLA compiles it"]
  for size, costs in result["sizes"].items():
    frozen, whole_network = list(costs.values())[:2]
    rows = [
      [
        name,
        f"{cost['flops'] / 1e12:.3f}",
        f"{cost['flops'] / frozen['flops']:.3f}",
        f"{cost['flops'] / whole_network['flops']:.3f}",
        f"{cost['moved'] / 1e9:.1f}",
        f"{cost['temporary'] / 1e6:,.0f}",
        f"{cost['sent'] / 1e6:.3f}",
      ]
      for name, cost in costs.items()
    ]
    title = (
      f"RoBERTa-{size}, {result['rows'][size]} rows of {result['length']}"
      f" tokens, {result['dtype']}, one step on {result['kind']}"
    )
    parts.append(f"**{title}**\n\n{markdown_table(COLUMNS, rows)}")
  versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
  parts.append(f"""\
Query and value are adapted. "frozen network" trains one number per output of
the same layers and the head: it takes the forward pass, and the gradient down
to the lowest of these layers. Like all others it computes of the last layer
what the head reads. "frozen network, whole" is forward and gradient from the
whole last layer down to the embeddings. It trains the biases, which is 0.03 %
of its FLOPs; its bytes and memory, but not its FLOPs, include the head at every
position. FLOPs and bytes moved are those of two layers, unrolled, and for each
further one what a third layer adds; temporary memory is the scanned step's at
full depth. "MB all-reduced" is what a step sends between several chips, in
float32 and once, as [tpu_pod.md](../../docs/tpu_pod.md) has it from programs
compiled for them.

- `{result["command"]}`
- {versions}""")
  return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
