"""What a run, or an ensemble, is made of, built from a config."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vera_jax.adapters.labels import join
from vera_jax.adapters.methods import make_adapter, settings_in
from vera_jax.adapters.sites import count_layers
from vera_jax.data.data import MeasureBatch, TaskData
from vera_jax.data.packing import Batch as HostBatch
from vera_jax.errors import UserError
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import fingerprint, read_model
from vera_jax.operations.quantised import NONE
from vera_jax.pretrained.blueprint import (
  Blueprint,
  Model,
  blueprint,
  decoder_in,
  load_model,
)
from vera_jax.pretrained.classifier import Classifier
from vera_jax.pretrained.sharding import (
  BATCH,
  REPLICATED,
  RUNS,
  Together,
  batch_shards,
  behind_runs,
  make_mesh,
  param_shardings,
  process_shard,
  put,
  put_rows,
)
from vera_jax.progress import bytes_bar, show_stage
from vera_jax.tasks.task import Batch, Task, task_for
from vera_jax.train.compiled_step import (
  CompiledStep,
  init_state,
  state_shape,
)
from vera_jax.train.config import DTYPES
from vera_jax.train.distributed import is_first
from vera_jax.train.each_run import each_run
from vera_jax.train.optim import (
  AUTO,
  EPS,
  LINEAR,
  Extent,
  automatic_rate,
  optimiser,
  rates_of,
)
from vera_jax.train.preemption import Stop
from vera_jax.train.runtime import (
  Background,
  compiler_options,
  meanwhile,
)
from vera_jax.train.step import Frozen, State, Tree, outputs_of

MANY = 1500  # steps, for which the rule's rates are probably too low
MANY_STEPS = (
  "; tried with 300 steps, and for thousands the paper's rates are up to 7"
  " times higher"
)


class Setup(NamedTuple):
  """Data, model and optimiser on a mesh; `config` is the first run's.

  Attributes:
    base: the base's folder.
    fingerprint: of the base's weights as they are now, which is computed while
      the run begins; "" but in the first process.
    optimiser: makes the transformation from `optim.rates_of`.
    extent: what an automatic rate depends on.
    shape: of a run's `State`, with places.
    evaluate: the compiled model: (params, frozen, batch) -> what the task
      measures, which every process has whole.
    evaluate_runs: the same of a run in each part of the mesh's `runs`: its
      params have a leading axis, and what it gives is a list.
  """

  config: ConfigDict
  base: Path
  fingerprint: Future[str]
  mesh: Mesh
  task: Task
  data: TaskData
  model: Model
  frozen: Frozen
  optimiser: Callable[..., optax.GradientTransformation]
  extent: Extent
  shape: State
  evaluate: jax.stages.Wrapped
  evaluate_runs: jax.stages.Wrapped
  background: Background

  @property
  def steps(self) -> int:
    return self.extent.steps

  @property
  def steps_between_evaluations(self) -> int:
    """Those of an epoch, or of as many as the config says."""
    return self.data.epoch_steps * self.config.get("eval_epochs", 1)

  @property
  def rows(self) -> NamedSharding:
    """How the rows of a batch lie on the mesh."""
    return NamedSharding(self.mesh, BATCH)

  def make_step(self, state: State, *, runs: int | None = None) -> CompiledStep:
    """The compiled step for states like this one."""
    plan = self.model.blueprint
    return CompiledStep(
      state,
      outputs=partial(outputs_of, plan.module, tuple(plan.inputs)),
      loss=self.task.loss,
      optimiser=self.optimiser,
      runs=runs,
    )

  def first_state(self, config: ConfigDict) -> State:
    """Step 0 of a run, whose config may differ in seed and first values."""
    model = self.model
    if config is not self.config:
      model = restart(model, config, self.mesh)
    tx = self.optimiser(**rates_of(config, self.extent))
    return init_state(model.trainable, tx, self.shape)

  def put_batch(
    self, batch: HostBatch, *, runs: int | None = None
  ) -> dict[str, Array]:
    """A host batch on the devices, from the rows that each process supplies.

    With `runs` its arrays have a leading axis, the mesh's `runs`.
    """
    rows = self.rows if runs is None else behind_runs(self.rows)
    placed = put_rows(batch, rows, self.data.shard)
    if jax.default_backend() != "cpu":
      return placed
    # While its inputs are being copied, and images take a while, a program runs
    # in another thread, which has no arena that keeps its temporaries
    # (`runtime.keep_freed_memory`): a tenth slower, and twice the memory.
    return jax.block_until_ready(placed)

  def put_sample(
    self, batch: HostBatch, *, runs: int | None = None
  ) -> dict[str, Array]:
    """A batch that every process has whole, of the shapes of a real one."""
    return put(batch, self.rows if runs is None else behind_runs(self.rows))

  def measure_with(
    self, params: Tree, stop: Stop | None = None
  ) -> MeasureBatch:
    """What the task evaluates by: host batch -> measured arrays.

    With `stop` it raises Stopped after a signal.
    """
    self.background.wait("evaluate")

    def measure(batch: HostBatch) -> Tree:
      if stop is not None:
        stop.check()
      return self.evaluate(params, self.frozen, self.put_batch(batch))

    return measure

  def measure_runs_with(self, params: Tree, stop: Stop) -> list[MeasureBatch]:
    """`measure_with` of a run in each part of the mesh's `runs`.

    A batch is measured for all of them when one first asks for it; the others
    ask for the same batches in the same order.
    """
    self.background.wait("evaluate")
    measured: list[list[Tree]] = []

    def measure_with(part: int) -> MeasureBatch:
      numbers = itertools.count()

      def measure(batch: HostBatch) -> Tree:
        number = next(numbers)
        if number == len(measured):
          stop.check()
          placed = self.put_batch(batch)
          measured.append(self.evaluate_runs(params, self.frozen, placed))
        return measured[number][part]

      return measure

    return [measure_with(part) for part in range(self.mesh.shape[RUNS])]

  def replicated(self, tree: Tree) -> Tree:
    """The same leaves, each whole on every device."""
    everywhere = NamedSharding(self.mesh, REPLICATED)
    return jax.jit(lambda leaves: leaves, out_shardings=everywhere)(tree)

  def trained(self, params: Tree) -> Classifier:
    """The model with trained leaves, on this process's first device.

    Every process calls it: sharded leaves are gathered.
    """
    plan = self.model.blueprint
    tree = join(params, self.frozen.params), self.frozen.projections
    leaves, projections = jax.tree.map(
      lambda leaf: jnp.asarray(np.asarray(leaf)), self.replicated(tree)
    )
    return Classifier(
      plan.module,
      leaves,
      projections,
      plan.family,
      plan.config,
      self.base,
      self.task.labels,
      self.task.kind,
      dict(self.task.stored),
      plan.adapter,
      plan.targets,
    )

  def compile_evaluation(self) -> None:
    """In the background: it is waited for before an evaluation."""
    batch = self.put_sample(self.data.eval_sample())
    params, evaluate = self.shape.params, self.evaluate
    if (parts := self.mesh.shape[RUNS]) > 1:
      params, evaluate = stacked(params, parts), self.evaluate_runs
    self.background.compile(
      "evaluate", lambda: evaluate.trace(params, self.frozen, batch)
    )


def stacked(shapes: Tree, runs: int) -> Tree:
  """The shapes and places of an ensemble's arrays, from those of one run's."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      (runs, *leaf.shape), leaf.dtype, sharding=behind_runs(leaf.sharding)
    ),
    shapes,
  )


def build_blueprint(
  config: ConfigDict, fields: Mapping[str, Any], task: Task, **options: Any
) -> Blueprint:
  """The model of a run's config, without weights; `options` are overrides."""
  settings = {
    "method": config.method,
    "settings": settings_in(config, config.method),
    "dtype": compute_dtype(config.model.dtype),
    "scan": config.model.scan,
    "remat": config.model.remat,
    "plan": config.model.contraction,
    "quantise": config.model.get("quantise", NONE),
  }
  return blueprint(
    fields, head=task.head, outputs=task.outputs, **{**settings, **options}
  )


def build_setup(config: ConfigDict, *, runs: int = 1) -> Setup:
  """Read the data, load the base, make adapter, head and optimiser.

  `runs` are to train together, for which the mesh is made.
  """
  together = Together(runs, config.optim.batch_size)
  mesh = make_mesh(**config.mesh, together=together)
  task = task_for(config)
  if config.data.get("general") and task.general_loss is None:
    raise UserError(
      f"config.data.general is {config.data.general}, but {task.name} measures"
      " no loss of general texts: leave it unset."
    )
  base = resolve(config.model.name)
  first = is_first()
  digest = meanwhile(lambda: fingerprint(base) if first else "")
  rows = NamedSharding(mesh, BATCH)
  if is_first():
    show_stage("reading the data")
  data = task.load(
    config, base, shards=batch_shards(mesh), shard=process_shard(rows)
  )
  rows_together, length, reads, longest = data.sizes
  sizes = rows_together // batch_shards(mesh), length, reads
  plan = build_blueprint(
    config, read_model(base), task, sizes=sizes, longest=longest, mesh=mesh
  )
  data.check(plan.family, plan.config)
  if task.write_texts is not None:  # at the end, when it is too late to say so
    try:
      decoder_in(plan.module, plan.config)
    except UserError as error:
      raise UserError(
        f"{task.name} writes texts at a run's end, but {error} Choose another"
        " model, or ask for no texts (config.data.test=false, or"
        " config.data.max_test_examples=0 and no config.data.choices)."
      ) from error
  bar = partial(bytes_bar, doing="loading the base", primary=is_first())
  model = load_model(plan, base, mesh=mesh, seed=config.seed, bar=bar)
  if not model.counts.adapter + model.counts.head:
    raise UserError(
      f"config.method={config.method} trains nothing here: the task has no head"
      " of its own. Choose a method with an adapter."
    )
  inputs = [t.inputs for t in plan.targets.values() for _ in range(t.layers)]
  extent = Extent(inputs, data.epoch_steps * config.optim.epochs)
  make_optimiser: Callable[..., optax.GradientTransformation] = partial(
    optimiser,
    model.labels,
    steps=extent.steps,
    warmup_ratio=config.optim.warmup_ratio,
    grad_clip=config.optim.grad_clip,
    eps=config.optim.get("eps", EPS),
    decay=config.optim.get("schedule", LINEAR),
  )

  def measured(params: Tree, frozen: Frozen, batch: Batch) -> Tree:
    names = tuple(plan.inputs)
    outputs, _ = outputs_of(plan.module, names, params, frozen, batch)
    return task.measure(outputs, batch)

  measured_of_runs = each_run(measured, mesh, in_axes=(0, None, None))

  def measured_in_parts(params: Tree, frozen: Frozen, batch: Batch) -> Tree:
    outputs = measured_of_runs(params, frozen, batch)
    leaves, tree = jax.tree.flatten(outputs)
    parts = zip(*leaves, strict=True)  # the first axis is that of the parts
    return [jax.tree.unflatten(tree, part) for part in parts]

  jit = partial(
    jax.jit,
    out_shardings=NamedSharding(mesh, REPLICATED),  # each process reads all
    compiler_options=compiler_options(jax.default_backend()),
  )
  tx = make_optimiser(**rates_of(config, extent))
  return Setup(
    config=config,
    base=base,
    fingerprint=digest,
    mesh=mesh,
    task=task,
    data=data,
    model=model,
    frozen=Frozen(model.frozen, model.projections),
    optimiser=make_optimiser,
    extent=extent,
    shape=state_shape(model, tx, mesh),
    evaluate=jit(measured),
    evaluate_runs=jit(measured_in_parts),
    background=Background(),
  )


def compute_dtype(name: str) -> np.dtype:
  """ "auto" is float32 on CPU and bfloat16 on accelerators."""
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  if name not in DTYPES:
    raise UserError(
      f"config.model.dtype is {name!r}; choose {', '.join(DTYPES)}."
    )
  return jnp.dtype(name)


def restart(model: Model, config: ConfigDict, mesh: Mesh) -> Model:
  """The model with the first leaves of another config of its ensemble.

  That config may differ in what leaves start from: the seed, VeRA's `d_init`.
  """
  plan = model.blueprint
  settings = settings_in(config, config.method)
  adapter, _ = make_adapter(config.method, settings)
  plan = plan._replace(module=plan.module.clone(adapter=adapter))
  base = join(model.trainable, model.frozen)
  fresh = plan.fresh_leaves(
    base, model.projections, list(model.fresh), config.seed
  )
  leaves = unflatten_dict(fresh)
  leaves = put(leaves, param_shardings(leaves, mesh, plan.family.rules))
  return model._replace(trainable=join(model.trainable, leaves))


def introduction(setup: Setup, titles: Sequence[str]) -> Iterator[str]:
  """What a run, or an ensemble by its titles, is about to do, for a person."""
  config, counts = setup.config, setup.model.counts
  device = jax.devices()[0]
  trained = counts.adapter + counts.head
  who = titles[0] if len(titles) == 1 else f"{len(titles)} runs at once"
  yield (
    f"{setup.task.name}, {config.method} on {config.model.name},"
    f" {who}; {jax.device_count()} × {device.device_kind}"
  )
  yield (
    f"trained: adapter {counts.adapter:,}, head {counts.head:,} of"
    f" {trained + counts.frozen:,} ({trained / (trained + counts.frozen):.2%})"
  )
  plan = setup.model.blueprint
  how = "stacked, one is compiled" if plan.scan else "looped"
  yield f"layers: {plan.config.num_hidden_layers}, {how}"
  yield from setup.task.presentation.notes
  data, *cut = setup.data.introduction()
  yield data
  if plan.targets:
    yield f"adapter on {count_layers(plan.targets)}"
  if config.optim.adapter_lr == AUTO:
    rate, steps = automatic_rate(config, setup.extent), setup.steps
    yield (
      f"adapter_lr {rate:.3g}, by the rule of docs/rates.md for {config.method}"
      f" on {len(setup.extent.inputs)} layers and {steps} steps"
      + (", of the first run" if len(titles) > 1 else "")
      + (MANY_STEPS if steps > MANY else "")
    )
  plans = plan.plans
  if plans:
    shown = ", ".join(
      f"{name} in {n}" for name, n in Counter(plans.values()).most_common()
    )
    rows, length = setup.data.sizes[:2]
    yield (
      f"contraction at {rows} × {length}: {shown} of {len(plans)}"
      " adapted products"
    )
  yield from setup.model.notes
  if len(titles) > 1:
    yield f"runs: {'; '.join(titles)}"
  if (parts := setup.mesh.shape[RUNS]) > 1:
    rest = setup.mesh.size // parts
    idle = -len(titles) % parts
    yield (
      f"split into {parts} parts, of {rest} device{'s' * (rest > 1)} each"
      + (f"; the room of {idle} more runs is idle" if idle else "")
    )
  yield from cut
