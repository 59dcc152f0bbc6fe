"""What a training step needs on one chip, by method, from compiled programs."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.plans.chips import Pod
from benchmarks.plans.collectives import Collective, collectives
from benchmarks.plans.depth import UNROLLED, counts
from benchmarks.plans.lowering import Step, architecture, step_of
from benchmarks.plans.search import largest
from vera_jax.models.bert import BertConfig
from vera_jax.train.model import compute_dtype
from vera_jax.train.sharding import batch_shards, make_mesh

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")


class TooLarge(Exception):
  """XLA found no room; `needed` and `room` in bytes, as it says."""

  def __init__(self, needed: int, room: int) -> None:
    super().__init__(f"{needed} bytes needed of {room}")
    self.needed, self.room = needed, room


def plan(
  config: ConfigDict,
  pod: Pod,
  *,
  rows: int | None = None,
  search: bool = True,
  effort: float = 0.0,
) -> dict[str, Any]:
  """The figures of a config's method on a pod, as JSON has them."""
  mesh = make_mesh(**config.mesh, over=pod.devices)
  dtype = _dtype(config.model.dtype)
  fields = architecture(config)
  shards = batch_shards(mesh)
  rows = -(-(rows or config.optim.batch_size) // shards) * shards
  length = config.data.max_length
  step = step_of(config, fields, mesh, dtype)
  compiles = Compiles(step, length, effort)
  result: dict[str, Any] = {
    "method": config.method,
    "mesh": {name: int(size) for name, size in mesh.shape.items()},
    "dtype": dtype.name,
    "effort": effort,
    "rows": rows,
    "rows_a_chip": rows // shards,
    "length": length,
    "parameters": step.model.counts._asdict(),
    "bytes": held(step),
  }
  try:
    compiled = compiles(rows)
    result |= counted(compiled, pod)
    result["flops"] = _flops(
      config,
      fields,
      compiled,
      lambda config, fields: step_of(config, fields, mesh, dtype).compile(
        rows, length, effort=effort
      ),
    )
  except TooLarge as error:
    result |= {"fits": False, "total": error.needed, "room": error.room}
  if search:
    most = largest(
      lambda a_chip: compiles.total(a_chip * shards),
      pod.memory,
      start=rows // shards,
    )
    result["largest"] = {"rows": most * shards, "rows_a_chip": most}
  unrolled = len(UNROLLED) * (config.model.scan and "flops" in result)
  result["compiles"] = compiles.count + unrolled
  return result


def _flops(
  config: ConfigDict,
  fields: BertConfig,
  compiled: Any,
  compile: Callable[[ConfigDict, BertConfig], Any],
) -> dict[str, float]:
  """Of a step on one chip; a scanned stack's are `depth.counts`'."""
  if config.model.scan:
    return {"a_chip": counts(config, fields, compile)["flops"]}
  return {"a_chip": compiled.cost_analysis()["flops"]}


def _dtype(name: str) -> Any:
  """As a run there takes it: "auto" is bfloat16 on accelerators."""
  return compute_dtype("bfloat16" if name == "auto" else name)


class Compiles:
  """A step's programs by row count, each compiled once."""

  def __init__(self, step: Step, length: int, effort: float = 0.0) -> None:
    self._step, self._length, self._effort = step, length, effort
    self._totals: dict[int, int | None] = {}
    self.count = 0

  def __call__(self, rows: int) -> Any:
    self.count += 1
    try:
      compiled = self._step.compile(rows, self._length, effort=self._effort)
    except jax.errors.JaxRuntimeError as error:
      self._totals[rows] = None
      raise _too_large(error) from error
    self._totals[rows] = total(compiled)
    return compiled

  def total(self, rows: int) -> int | None:
    """Bytes on a chip; None where XLA finds no room."""
    if rows not in self._totals:
      try:
        self(rows)
      except TooLarge:
        pass
    return self._totals[rows]


def _too_large(error: Exception) -> Exception:
  match = _NEEDED.search(str(error))
  if match is None and "RESOURCE_EXHAUSTED" not in str(error):
    return error
  if match is None:
    return TooLarge(0, 0)
  sizes = (
    float(match[1]) * _UNITS[match[2]],
    float(match[3]) * _UNITS[match[4]],
  )
  return TooLarge(*map(int, sizes))


def held(step: Step) -> dict[str, int]:
  """Bytes of the arguments on one chip, by kind, as numbers fill them."""
  return {
    "base": _bytes(step.model.frozen.params),
    "projections": _bytes(step.model.frozen.projections),
    "trainables": _bytes(step.state.params),
    "optimiser": _bytes(step.state.opt_state),
    "gradients": _bytes(step.sums),
  }


def _bytes(tree: Any) -> int:
  def one(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return leaf.dtype.itemsize * math.prod(shape)

  return sum(map(one, jax.tree.leaves(tree)))


def total(compiled: Any) -> int:
  """Bytes that the program has on a chip at once, padding included."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.generated_code_size_in_bytes
  )


def counted(compiled: Any, pod: Pod) -> dict[str, Any]:
  """Memory and collectives of a compiled program."""
  memory = compiled.memory_analysis()
  needed = total(compiled)
  return {
    "temporaries": memory.temp_size_in_bytes,
    "arguments": memory.argument_size_in_bytes,
    "total": needed,
    "room": pod.memory,
    "fits": needed <= pod.memory,
    "collectives": _grouped(collectives(compiled.as_text())),
  }


def _grouped(found: list[Collective]) -> list[dict[str, Any]]:
  """Equal ones once, with how often a step runs them."""
  times: dict[tuple, int] = {}
  for one in found:
    key = one.kind, one.types, one.bytes, one.looped
    times[key] = times.get(key, 0) + one.times
  return [
    {
      "kind": kind,
      "types": list(types),
      "bytes": size,
      "times": count,
      "looped": looped,
    }
    for (kind, types, size, looped), count in times.items()
  ]
