"""What a training step needs on one chip, by method, from compiled programs."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.plans.chips import Pod
from experiments.plans.collectives import collectives
from experiments.plans.hlo import product_flops
from experiments.plans.lowering import (
  ANY_RATES,
  AbstractStep,
  Rows,
  abstract_step,
  architecture,
  bytes_on_a_chip,
  optimiser_of,
)
from experiments.plans.meshes import ROOM, Candidate, candidates, working_bytes
from experiments.plans.search import largest
from experiments.plans.tasks import planned_task, row_size
from vera_jax.errors import UserError
from vera_jax.models.family import config_of
from vera_jax.pretrained.blueprint import (
  Blueprint,
  Model,
  abstract_model,
  choose_scan,
)
from vera_jax.pretrained.sharding import RUNS, batch_shards, make_mesh
from vera_jax.train.compiled_step import state_shape
from vera_jax.train.setup import build_blueprint, compute_dtype

MESHES = CONFIG, SEARCH = ("config", "search")
DEFAULT_MESH = {"data": -1, "fsdp": 1, "tensor": 1, "runs": -1}
LARGE = 10**9  # numbers of a network whose programs take minutes to compile
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
  learned: int | None = None,
  labels: int | None = None,
  runs: int | None = None,
  mesh_of: str | None = None,
  search: bool | None = None,
  effort: float = 0.0,
  memory: int | None = None,
  **options: Any,
) -> dict[str, Any]:
  """The figures of a config's method on a pod, as the plan's JSON has them.

  Args:
    config: a run's, checked.
    pod: the chips, which the mesh splits.
    rows: of a run's batch; None for `config.optim.batch_size`. Rounded up to a
      whole number per batch shard.
    learned, labels: as for `tasks.row_size` and `tasks.planned_task`.
    runs: of an ensemble, which `config.mesh.runs` splits; None for one alone.
    mesh_of: whose mesh, a name in `MESHES`; None for the config's, unless that
      is no other than the default one, and a step on it would not fit.
    search: whether to find the largest batch that fits; None for networks of
      fewer than `LARGE` numbers alone.
    effort: XLA's own setting, from -1 to 1.
    memory: bytes of a chip that XLA plans for; None for all that it has.
    **options: of the model, in place of the config's method.
  """
  config = config.copy_and_resolve_references()
  name = config.model.dtype  # "auto" as a run on these chips takes it
  dtype = compute_dtype("bfloat16" if name == "auto" else name)
  fields = architecture(config)
  depth = config_of(fields).num_hidden_layers
  with config.ignore_type():  # of "auto", which becomes true or false
    config.model.scan = choose_scan(
      config.model.scan, layers=depth, platform="tpu"
    )
  task = planned_task(config, labels=labels)
  length, learned = row_size(config, fields, task, learned)
  options |= {"dtype": dtype}
  asked = Rows(rows or config.optim.batch_size, length, learned)
  network = build_blueprint(config, fields, task, **options)

  def stored(model: Model, mesh: Mesh) -> int:
    tx = optimiser_of(config, model)(**ANY_RATES)
    state = state_shape(model, tx, mesh)
    return bytes_on_a_chip((model.frozen, model.projections, state))

  tried: list[Candidate] = []
  microbatches = 1
  if mesh_of == SEARCH or (
    mesh_of is None
    and runs is None
    and config.mesh.to_dict() == DEFAULT_MESH
    and not fits(network, pod, asked, stored)
  ):
    tried = candidates(network, pod, asked, stored)
    best = tried[0]
    if best.refused:
      raise UserError(f"No mesh over {pod.name} can be used: {best.refused}")
    config.mesh.update({"fsdp": best.fsdp, "tensor": best.tensor})
    microbatches = best.microbatches
  mesh = make_mesh(**config.mesh, over=pod.devices)
  shards = batch_shards(mesh)
  # of a microbatch from here on
  rows = -(-asked.rows // (shards * microbatches)) * shards
  if runs is not None:  # parts that lack a run compute as much as the others
    runs = -(-runs // mesh.shape[RUNS]) * mesh.shape[RUNS]
  step = abstract_step(config, fields, mesh, runs=runs, task=task, **options)
  totals: dict[int, int | None] = {}  # bytes on a chip by rows; None: no room

  def compile(rows: int) -> Any:
    one = asked._replace(rows=rows)
    compiled = compile_if_it_fits(step, one, effort=effort, memory=memory)
    totals[rows] = None if isinstance(compiled, TooLarge) else total(compiled)
    return compiled

  result: dict[str, Any] = {
    "method": config.method,
    "mesh": {name: int(size) for name, size in mesh.shape.items()},
    "dtype": dtype.name,
    "effort": effort,
    "rows": rows * microbatches,
    "rows_a_chip": rows * microbatches // shards,
    "microbatches": microbatches,
    "length": length,
    "learned": learned,
    "parameters": step.model.counts._asdict(),
    "bytes": held(step),
    "checkpoint": sum(
      leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.state)
    ),
    "searched": [one._asdict() for one in tried],
  }
  compiled = compile(rows)
  if isinstance(compiled, TooLarge):
    result["fits"] = False
    result["total"] = compiled.needed or None
    result["room"] = compiled.room or pod.memory
  else:
    used = compiled.memory_analysis()
    result |= {
      "temporaries": used.temp_size_in_bytes,
      "arguments": used.argument_size_in_bytes,
      "peak": used.peak_memory_in_bytes + used.generated_code_size_in_bytes,
      "total": totals[rows],
      "room": pod.memory,
      "fits": total(compiled) <= pod.memory,
      **sent_and_computed(compiled, pod, microbatches),
    }
  if search or (search is None and sum(step.model.counts) < LARGE):

    def use(rows_a_chip: int) -> int | None:
      if rows_a_chip * shards not in totals:
        compile(rows_a_chip * shards)
      return totals[rows_a_chip * shards]

    most = largest(use, pod.memory, start=rows // shards)
    result["largest"] = {"rows": most * shards, "rows_a_chip": most}
  result["compiles"] = len(totals)
  return result


def fits(
  network: Blueprint,
  pod: Pod,
  asked: Rows,
  stored: Callable[[Model, Mesh], int],
) -> bool:
  """Whether a step on a mesh of `data` alone does, by the estimate."""
  mesh = make_mesh(over=pod.devices)
  each = -(-asked.rows // batch_shards(mesh))
  asked = asked._replace(rows=each * batch_shards(mesh))
  model = abstract_model(network, mesh=mesh)
  needed = stored(model, mesh) + working_bytes(model, mesh, asked)
  return needed <= ROOM * pod.memory


def sent_and_computed(
  compiled: Any, pod: Pod, microbatches: int
) -> dict[str, Any]:
  """What a chip computes and sends in a step of so many microbatches, each of
  which runs this program, but for the one sum at the step's end; and the
  seconds that this takes at the chip's highest rates: a bound, no estimate."""
  text = compiled.as_text()
  sent = Counter[Any]()
  for one in collectives(text):
    at_the_end = one.kind == "all-reduce" and not one.looped
    times = one.times * (1 if at_the_end else microbatches)
    sent[one._replace(times=0)] += times
  collected = [one._replace(times=times) for one, times in sent.items()]
  flops = microbatches * product_flops(text)
  wire = sum(one.wire for one in collected)
  memory = compiled.memory_analysis()
  # what is gathered is written, and read
  arrived = sum(2 * one.bytes * one.times for one in collected)
  moved = microbatches * memory.argument_size_in_bytes + arrived
  seconds = {
    "computing": flops / pod.flops,
    "memory": moved / pod.bandwidth,
    "wire": wire / pod.links,
  }
  return {
    "collectives": [one._asdict() for one in collected],
    "flops": {"a_chip": flops},
    "wire": wire,
    "seconds": seconds,
    "bound": max(seconds.values()),
  }


def compile_if_it_fits(
  step: AbstractStep, rows: Rows, *, effort: float, memory: int | None = None
) -> Any:
  """XLA's program of a step, or `TooLarge`."""
  try:
    return step.compile(*rows, effort=effort, memory=memory)
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
  kinds = {
    "base": step.frozen.params,
    "projections": step.frozen.projections,
    "trainables": step.state.params,
    "optimiser": step.state.opt_state,
    "gradients": step.state.params,  # each lies where its leaf lies
  }
  return {name: bytes_on_a_chip(shapes) for name, shapes in kinds.items()}


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
