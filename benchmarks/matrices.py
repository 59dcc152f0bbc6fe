"""What the random pair costs by how it is made, from programs nobody ran.

  python -m benchmarks.matrices
  python -m benchmarks.matrices --device=cpu

VeRA at r = 1024 on query and value of RoBERTa-base and on all linear layers of
Llama's 7B and 405B, with a dense pair (A and B among the program's arguments)
and with the structured one (`adapters/structured.py`), each factored and folded
into the kernels. Two programs of one layer's adapted products, its counts times
the number of layers:

  training  forward, and the gradients of d, b and x, at the tokens per device
            that TOKENS has
  decoding  forward of one token

FLOPs, bytes moved and temporary memory are XLA's own counts, for one chip of a
described TPU in bfloat16 (no TPU is needed, only `pip install libtpu`) or for
this machine's CPU in float32. Temporary memory is one layer's. What the table
has of FLOPs and bytes is what the adapter adds: the program's less those of the
same program without an adapter.

  python -m benchmarks.matrices --whole

counts RoBERTa-base's whole training step as well, as `benchmarks.step` does,
with either pair. What an earlier call of the same versions has counted stays in
the file; --anew counts it again. A large folded step takes the compiler of TPUs
minutes: --plans=factored leaves it out.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax import Array
from jax.sharding import SingleDeviceSharding

from benchmarks import step
from benchmarks.report import environment, write
from configs import rte
from experiments import cli
from experiments.markdown import markdown_table
from experiments.plans.chips import device_named, use_no_accelerator
from experiments.plans.frozen import column_bias
from vera_jax.adapters.adapted_product import adapted_product
from vera_jax.adapters.interface import Adapter, Leaves, Site, Target
from vera_jax.adapters.interface import Path as Place
from vera_jax.adapters.vera import vera
from vera_jax.files import read_json

RANK = 1024
NONE, DENSE, STRUCTURED = "none", "kaiming_uniform", "structured"
PLANS = ("factored", "folded")
VARIANTS = [(NONE, "")] + [(x, p) for x in (DENSE, STRUCTURED) for p in PLANS]
TRAINING, DECODING = "training", "decoding"


class Network(NamedTuple):
  """What is adapted of a network.

  Attributes:
    layers: how many.
    products: of one layer: (inputs, the outputs of all products on this x).
    tokens: per device, of a training step.
  """

  layers: int
  products: tuple[tuple[int, tuple[int, ...]], ...]
  tokens: int


def llama(layers: int, width: int, kv: int, wide: int, tokens: int) -> Network:
  """All linear layers: q k v, o, gate and up, down."""
  products = (
    (width, (width, kv, kv)),
    (width, (width,)),
    (width, (wide, wide)),
    (wide, (width,)),
  )
  return Network(layers, products, tokens)


NETWORKS = {
  "RoBERTa-base, q and v": Network(12, ((768, (768, 768)),), 64 * 128),
  "Llama-7B, all linear": llama(32, 4096, 4096, 11008, 2048),
  "Llama-405B, all linear": llama(126, 16384, 1024, 53248, 2048),
}


def define_flags() -> None:
  flags.DEFINE_multi_enum("networks", list(NETWORKS), list(NETWORKS), "Which.")
  flags.DEFINE_string(
    "device", "v5e:2x2", "A TPU topology, whose first chip is taken; or cpu."
  )
  flags.DEFINE_multi_enum("plans", list(PLANS), list(PLANS), "Which.")
  flags.DEFINE_bool("whole", False, "RoBERTa-base's whole step as well.")
  flags.DEFINE_bool("anew", False, "Count again what the file has.")
  flags.DEFINE_string("out", "results/benchmarks", "Where the files go.")


def main() -> None:
  use_no_accelerator()
  options = flags.FLAGS
  device = device_named(options.device)
  path = Path(options.out) / f"matrices-{options.device.partition(':')[0]}.json"
  result = environment("matrices") | {
    "device": options.device,
    "kind": device.device_kind,
    "dtype": "float32" if device.platform == "cpu" else "bfloat16",
    "rank": RANK,
  }
  known: dict[tuple[str, ...], dict[str, Any]] = {}
  if path.exists() and not options.anew:
    there = read_json(path)
    same = ("versions", "device", "dtype", "rank")
    if all(there.get(key) == result[key] for key in same):
      known = {_key(row): row for row in there["rows"]}
  rows = [
    row
    for row in planned(options.networks, whole=options.whole)
    if row["plan"] in ("", *options.plans)
  ]
  # what takes a compiler longest comes last
  for row in sorted(
    rows, key=lambda row: (row["plan"] == "folded", row["work"])
  ):
    if _key(row) not in known:
      known[_key(row)] = row | count(row, device, result["dtype"])
      print(known[_key(row)], flush=True)
      order = [_key(row) for row in planned(NETWORKS, whole=True)]
      done = sorted(known.values(), key=lambda row: order.index(_key(row)))
      write(path.stem, result | {"rows": done}, folder=options.out)
  print(f"\n{markdown(read_json(path))}\n{path}")


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
  return tuple(row[name] for name in ("network", "work", "pair", "plan"))


WHOLE = "RoBERTa-base, the whole step"


def planned(
  networks: Sequence[str] | Mapping[str, Network], *, whole: bool
) -> Iterator[dict[str, str]]:
  """What tells the rows of the result from each other."""
  for network in networks:
    for work in (TRAINING, DECODING):
      for pair, plan in VARIANTS:
        yield {"network": network, "work": work, "pair": pair, "plan": plan}
  if whole:
    for pair, plan in VARIANTS:
      yield {"network": WHOLE, "work": TRAINING, "pair": pair, "plan": plan}


def count(row: Mapping[str, str], device: Any, dtype: str) -> dict[str, Any]:
  """XLA's counts of a row's program."""
  if row["network"] == WHOLE:
    return count_whole(row, device, dtype)
  network = NETWORKS[row["network"]]
  training = row["work"] == TRAINING
  tokens = network.tokens if training else 1
  try:
    compiled, pair = compile_layer(
      network,
      row["pair"],
      row["plan"] or "factored",
      tokens=tokens,
      training=training,
      device=device,
      dtype=dtype,
    )
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {"tokens": tokens, "layers": network.layers, "fits": False}
  costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
  return {
    "tokens": tokens,
    "layers": network.layers,
    "fits": True,
    "flops": costs["flops"] * network.layers,
    "moved": costs["bytes accessed"] * network.layers,
    "temporary": memory.temp_size_in_bytes,
    "pair_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pair)),
    "pair_arguments": sorted(
      {f"{x.dtype.name}{list(x.shape)}" for x in jax.tree.leaves(pair)}
    ),
  }


def count_whole(
  row: Mapping[str, str], device: Any, dtype: str
) -> dict[str, Any]:
  """Of RoBERTa-base's training step; without an adapter, of the head's."""
  config = rte.get_config("base")
  config.model.scan, length = True, 128
  if row["pair"] == NONE:
    targets = tuple(config.vera.targets)
    config.method = "head"
    variant = step.Variant(config, (column_bias(), targets))
  else:
    config.vera.init, config.model.contraction = row["pair"], row["plan"]
    variant = step.Variant(config)
  counted = step.cost(variant, length=length, device=device, dtype=dtype)
  del counted["sent"]
  tokens = config.optim.batch_size * length
  return {"tokens": tokens, "layers": 12, "fits": True, **counted}


def adapted_sites(
  network: Network, adapter: Adapter | None
) -> tuple[dict[Place, Target], dict[str, Any], dict[Place, Leaves]]:
  """One layer's sites, and the shapes of the pair and of the leaves."""
  targets: dict[Place, Target] = {
    (str(group), str(number)): Target(inputs, outputs)
    for group, (inputs, all_outputs) in enumerate(network.products)
    for number, outputs in enumerate(all_outputs)
  }
  if adapter is None:
    return targets, {}, {}
  shared, init = adapter.shared, adapter.init
  assert shared is not None and init is not None
  key = jax.random.key(0)

  def leaves() -> dict[Place, Leaves]:
    return {
      path: init(key, Site(path, *target[:2], kernel=lambda: jnp.zeros(())))
      for path, target in targets.items()
    }

  pair = jax.eval_shape(lambda: shared(targets))
  return targets, pair, jax.eval_shape(leaves)


def compile_layer(
  network: Network,
  pair: str,
  plan: str,
  *,
  tokens: int,
  training: bool,
  device: Any,
  dtype: str,
) -> tuple[Any, dict[str, Any]]:
  """One layer's program, and what it has of the pair among its arguments."""
  adapter = None if pair == NONE else vera(RANK, init=pair)
  targets, shared, leaves = adapted_sites(network, adapter)

  def array(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)

  xs = [array(tokens, inputs) for inputs, _ in network.products]
  kernels = {p: array(t.inputs, t.outputs) for p, t in targets.items()}
  gs = {p: array(tokens, t.outputs) for p, t in targets.items()}

  def forward(
    trained: tuple[Any, Sequence[Array]], kernels: Any, shared: Any
  ) -> dict[Place, Array]:
    leaves, xs = trained
    products = {}
    for path, target in targets.items():
      x, kernel = xs[int(path[0])], kernels[path]
      if adapter is None:
        products[path] = x @ kernel
        continue
      site = Site(path, *target[:2], kernel=partial(_same, kernel))
      site = site._replace(shared=shared)
      products[path], _ = adapted_product(
        adapter, leaves[path], site, x, plan=plan
      )
    return products

  def train(trained: Any, kernels: Any, shared: Any, gs: Any) -> Any:
    ys, back = jax.vjp(lambda inputs: forward(inputs, kernels, shared), trained)
    return ys, back(gs)

  arguments: tuple[Any, ...] = ((leaves, xs), kernels, shared)
  program: Any = forward
  if training:
    program, arguments = train, (*arguments, gs)
  sharding = SingleDeviceSharding(device)
  arguments = jax.tree.map(lambda x: x.update(sharding=sharding), arguments)
  return jax.jit(program).lower(*arguments).compile(), shared


def _same(kernel: Array) -> Array:
  return kernel


def markdown(result: Mapping[str, Any]) -> str:
  """A table per network and work."""
  rows: Sequence[Mapping[str, Any]] = result["rows"]
  lines: list[str] = []
  for network in (*NETWORKS, WHOLE):
    for work in (TRAINING, DECODING):
      chosen = [x for x in rows if (x["network"], x["work"]) == (network, work)]
      if chosen:
        lines += _table(network, work, chosen)
  versions = result["versions"]
  lines += [
    f"r = {result['rank']}, {result['dtype']}, {result['kind']}; XLA's counts"
    f" of programs compiled for it by jax {versions['jax']}, of all layers."
    ' "Added" is what the program has beyond the same one without an adapter.'
    " Temporary memory is of one layer, of the whole step that of the step."
    " The pair: what of it is among the program's arguments. XLA may compile"
    " the rest of two programs differently, so that little may come out as less"
    " than nothing.",
  ]
  return "\n".join(lines)


HEADER = (
  *("pair", "plan", "GFLOP added", "of dense, factored"),
  *("GB moved, added", "MB temporary", "MB of the pair"),
)


def _table(
  network: str, work: str, rows: Sequence[Mapping[str, Any]]
) -> list[str]:
  by_variant = {(row["pair"], row["plan"]): row for row in rows}
  base = by_variant.get((NONE, ""))
  if base is None:
    return []
  beside = by_variant.get((DENSE, "factored"))
  tokens = f"{base['tokens']:,} tokens" if base["tokens"] > 1 else "one token"
  title = f"**{network}, {work}, {tokens}**"
  if base["fits"]:
    title += (
      f": without an adapter {base['flops'] / 1e9:,.3f} GFLOP,"
      f" {base['moved'] / 1e9:,.2f} GB"
    )
  lines = []
  for (pair, plan), row in by_variant.items():
    if pair == NONE:
      continue
    if not row["fits"] or not base["fits"]:
      lines.append((_NAMES[pair], plan, "does not fit", "", "", "", ""))
      continue
    added = row["flops"] - base["flops"]
    share = ""
    if beside and beside["fits"]:
      share = f"{added / (beside['flops'] - base['flops']):.3f}"
    stored = row.get("pair_bytes")
    lines.append(
      (
        _NAMES[pair],
        plan,
        f"{added / 1e9:,.3f}",
        share,
        f"{(row['moved'] - base['moved']) / 1e9:,.2f}",
        f"{row['temporary'] / 1e6:,.1f}",
        "" if stored is None else f"{stored / 1e6:,.3f}",
      )
    )
  return [title, "", markdown_table(HEADER, lines, texts=2), ""]


_NAMES = {DENSE: "dense", STRUCTURED: "structured"}


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
