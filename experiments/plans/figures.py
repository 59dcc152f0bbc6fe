"""What a training step needs on one chip, by method, from compiled programs."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from experiments.plans.chips import Pod
from experiments.plans.collectives import collectives
from experiments.plans.depth import UNROLLED, counts
from experiments.plans.lowering import (
  AbstractStep,
  abstract_step,
  architecture,
)
from experiments.plans.search import largest
from vera_jax.models.family import config_of
from vera_jax.pretrained.blueprint import choose_scan
from vera_jax.pretrained.sharding import RUNS, batch_shards, make_mesh
from vera_jax.train.setup import compute_dtype

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT])"
# XLA's two ways to say it: in all, or that the temporaries alone are too much
_NEEDED = re.compile(
  rf"Used {_SIZE} of {_SIZE} hbm"
  rf"|temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"
)


class TooLarge(NamedTuple):
  """A program that XLA found no room for, in bytes; 0 where it says none."""

  needed: int
  room: int


def plan(
  config: ConfigDict,
  pod: Pod,
  *,
  rows: int | None = None,
  runs: int | None = None,
  search: bool = True,
  effort: float = 0.0,
) -> dict[str, Any]:
  """The figures of a config's method on a pod, as the plan's JSON has them.

  Args:
    config: a run's, checked.
    pod: the chips, which `config.mesh` splits.
    rows: of a run's batch; None for `config.optim.batch_size`. Rounded up to a
      whole number per batch shard.
    runs: of an ensemble, which `config.mesh.runs` splits; None for one alone.
    search: whether to find the largest batch that fits.
    effort: XLA's own setting, from -1 to 1.
  """
  mesh = make_mesh(**config.mesh, over=pod.devices)
  config = config.copy_and_resolve_references()
  name = config.model.dtype  # "auto" as a run on these chips takes it
  dtype = compute_dtype("bfloat16" if name == "auto" else name)
  fields, shards = architecture(config), batch_shards(mesh)
  depth = config_of(fields).num_hidden_layers
  with config.ignore_type():  # of "auto", which becomes true or false
    config.model.scan = choose_scan(
      config.model.scan, layers=depth, platform="tpu"
    )
  rows = -(-(rows or config.optim.batch_size) // shards) * shards
  length = config.data.max_length
  if runs is not None:  # parts that lack a run compute as much as the others
    runs = -(-runs // mesh.shape[RUNS]) * mesh.shape[RUNS]
  step = abstract_step(config, fields, mesh, runs=runs, dtype=dtype)
  totals: dict[int, int | None] = {}  # bytes on a chip by rows; None: no room

  def compile(rows: int) -> Any:
    compiled = compile_if_it_fits(step, rows, length, effort=effort)
    totals[rows] = None if isinstance(compiled, TooLarge) else total(compiled)
    return compiled

  def compile_other(config: ConfigDict, fields: Mapping[str, Any]) -> Any:
    other = abstract_step(config, fields, mesh, runs=runs, dtype=dtype)
    return other.compile(rows, length, effort=effort)

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
  unrolled = 0
  compiled = compile(rows)
  if isinstance(compiled, TooLarge):
    result["fits"] = False
    result["total"] = compiled.needed or None
    result["room"] = compiled.room or pod.memory
  else:
    memory = compiled.memory_analysis()
    sent = Counter[Any]()
    for one in collectives(compiled.as_text()):
      sent[one._replace(times=0)] += one.times
    if config.model.scan:
      flops = counts(config, fields, compile_other)["flops"]
      unrolled = len(UNROLLED)
    else:
      flops = compiled.cost_analysis()["flops"]
    result |= {
      "temporaries": memory.temp_size_in_bytes,
      "arguments": memory.argument_size_in_bytes,
      "total": totals[rows],
      "room": pod.memory,
      "fits": total(compiled) <= pod.memory,
      "collectives": [
        one._replace(times=times)._asdict() for one, times in sent.items()
      ],
      "flops": {"a_chip": flops},
    }
  if search:

    def use(rows_a_chip: int) -> int | None:
      if rows_a_chip * shards not in totals:
        compile(rows_a_chip * shards)
      return totals[rows_a_chip * shards]

    most = largest(use, pod.memory, start=rows // shards)
    result["largest"] = {"rows": most * shards, "rows_a_chip": most}
  result["compiles"] = len(totals) + unrolled
  return result


def compile_if_it_fits(
  step: AbstractStep, rows: int, length: int, *, effort: float
) -> Any:
  """XLA's program of a step, or `TooLarge`."""
  try:
    return step.compile(rows, length, effort=effort)
  except jax.errors.JaxRuntimeError as error:
    if match := _NEEDED.search(str(error)):
      needed, unit, room, room_unit = filter(None, match.groups())
      return TooLarge(
        int(float(needed) * _UNITS[unit]), int(float(room) * _UNITS[room_unit])
      )
    if "RESOURCE_EXHAUSTED" in str(error):
      return TooLarge(0, 0)
    raise


def held(step: AbstractStep) -> dict[str, int]:
  """Bytes of a step's arrays on one chip, by kind, without padding."""
  return {
    "base": _bytes(step.frozen.params),
    "projections": _bytes(step.frozen.projections),
    "trainables": _bytes(step.state.params),
    "optimiser": _bytes(step.state.opt_state),
    "gradients": _bytes(step.state.params),  # each lies where its leaf lies
  }


def _bytes(tree: Any) -> int:
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )


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
