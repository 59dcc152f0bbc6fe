"""The real training step of a config, compiled from shapes alone.

No weight, no text and no device of the kind is needed: the mesh may be made of
a topology's described chips. The program is a whole step of one microbatch.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vera_jax.models.family import read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.known_shapes import KNOWN
from vera_jax.pretrained.blueprint import Model, abstract_model
from vera_jax.pretrained.sharding import BATCH, REPLICATED
from vera_jax.tasks.task import Task, task_for
from vera_jax.train.compiled_step import CompiledStep, state_shape
from vera_jax.train.optim import optimiser
from vera_jax.train.setup import build_blueprint, stacked
from vera_jax.train.step import Frozen, State, outputs_of

NUMBERS = ("adapter_lr", "head_lr", "weight_decay")  # the optimiser's
ANY_RATES = dict.fromkeys(NUMBERS, 0.0)  # the state's shape is the same
EFFORTS = ("exec_time_optimization_effort", "memory_fitting_effort")


class Rows(NamedTuple):
  """The rows of a step or of one of its microbatches, on all chips.

  Attributes:
    rows: how many.
    length: of each, in tokens; of images the pixels of a side.
    learned: places of each that are learned.
  """

  rows: int
  length: int
  learned: int = 1


class AbstractStep(NamedTuple):
  """A training step whose arguments are shapes with places on a mesh."""

  model: Model
  state: State
  step: CompiledStep
  mesh: Mesh
  runs: int | None = None

  @property
  def frozen(self) -> Frozen:
    return Frozen(self.model.frozen, self.model.projections)

  def arguments(self, rows: int, length: int, slots: int = 1) -> Any:
    """(a microbatch, the key, the rates) as shapes, for the same numbers."""
    inputs = self.model.blueprint.family.inputs(rows, length, slots)
    batch = {
      **inputs,
      "labels": jax.ShapeDtypeStruct((rows, slots), jnp.int32),
      "weights": jax.ShapeDtypeStruct((rows, slots), jnp.float32),
    }
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    small = jax.eval_shape(jax.random.key, 0), dict.fromkeys(NUMBERS, rate)
    made = (
      placed(batch, self.mesh, BATCH),
      *placed(small, self.mesh, REPLICATED),
    )
    return made if self.runs is None else stacked(made, self.runs)

  def compile(
    self,
    rows: int,
    length: int,
    slots: int = 1,
    *,
    effort: float = 0.0,
    memory: int | None = None,
  ) -> Any:
    """XLA's program of a step of one microbatch.

    Args:
      rows, length: of the microbatch, in rows and in tokens per row.
      slots: examples per row at most.
      effort: XLA's own setting, from -1 (least) to 1; 0 is its default.
      memory: bytes of a TPU chip that XLA plans for; None for what it has.
    """
    batch, key, rates = self.arguments(rows, length, slots)
    lowered = self.step.lower_whole(self.frozen, batch, key, rates)
    options: dict[str, Any] = dict.fromkeys(EFFORTS, effort) if effort else {}
    if memory is not None:
      options["xla_tpu_max_hbm_size_mib"] = memory // 2**20
    return lowered.compile(options or None)


def placed(tree: Any, mesh: Mesh, spec: Any) -> Any:
  """Shapes with a place on the mesh."""
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), tree)


def architecture(config: ConfigDict) -> dict[str, Any]:
  """config.json of the model; some are known without a download."""
  name = config.model.name
  if name in KNOWN and not Path(name).exists():
    return dict(KNOWN[name])
  return read_fields(resolve(name))


def numbers_on_a_chip(shapes: Any) -> int:
  """Numbers that one chip has of arrays, which have places on a mesh."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(shapes)
  )


def bytes_on_a_chip(shapes: Any) -> int:
  """Bytes of the same, without padding."""
  return sum(
    leaf.dtype.itemsize * numbers_on_a_chip(leaf)
    for leaf in jax.tree.leaves(shapes)
  )


def optimiser_of(
  config: ConfigDict, model: Model, *, steps: int = 1000
) -> Callable[..., Any]:
  """Makes the transformation from `optim.rates_of`, as a run's does."""
  return partial(
    optimiser,
    model.labels,
    steps=steps,
    warmup_ratio=config.optim.warmup_ratio,
    grad_clip=config.optim.grad_clip,
  )


def abstract_step(
  config: ConfigDict,
  fields: Mapping[str, Any],
  mesh: Mesh,
  *,
  steps: int = 1000,
  runs: int | None = None,
  task: Task | None = None,
  **options: Any,
) -> AbstractStep:
  """The step that a run of this config trains with.

  Args:
    config: a run's.
    fields: of the base's config.json.
    mesh: of any devices, described ones among them.
    steps: of the learning rate's schedule; no count depends on it.
    runs: of an ensemble, as many for each part of the mesh; None for one alone.
    task: the config's; None to make it, which may read data.
    **options: what `models.pretrained.blueprint` takes in place of the config's
      own, such as `dtype` or `adapter`.
  """
  task = task or task_for(config)
  network = build_blueprint(config, fields, task, mesh=mesh, **options)
  model = abstract_model(network, mesh=mesh)
  make_optimiser = optimiser_of(config, model, steps=steps)
  state = state_shape(model, make_optimiser(**ANY_RATES), mesh)
  if runs is not None:
    state = stacked(state, runs)
  step = CompiledStep(
    state,
    outputs=partial(outputs_of, network.module, tuple(network.inputs)),
    loss=task.loss,
    optimiser=make_optimiser,
    runs=runs,
  )
  return AbstractStep(model, state, step, mesh, runs)
