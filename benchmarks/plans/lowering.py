"""The real training step of a config, compiled from shapes alone.

No weight, no text and no device of the kind is needed: the mesh may be made of
a topology's described chips. The program is the one that a run compiles for a
pass over so many rows.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from vera_jax.train.model import Model, Parts, build_module, state_shape

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.interface import Adapter
from vera_jax.adapters.labels import FROZEN, count, label_tree, split
from vera_jax.hub import resolve
from vera_jax.models.bert import BertConfig, input_shapes
from vera_jax.models.hf_weights import LEAVES, load_config
from vera_jax.models.roberta import SIZES, roberta
from vera_jax.tasks.glue import glue_task
from vera_jax.train.optim import optimiser
from vera_jax.train.run import hyperparameters
from vera_jax.train.sharding import (
  BATCH,
  REPLICATED,
  param_shardings,
)
from vera_jax.train.step import (
  Frozen,
  State,
  jit_member_pass,
  pass_shapes,
  sums_shape,
)

_STEPS = 1000  # of the schedule, which no count depends on


class Step(NamedTuple):
  """A step's arguments as shapes with places, and the jitted function."""

  model: Model
  state: State
  sums: Any
  function: Any
  mesh: Mesh

  def compile(
    self, rows: int, length: int, slots: int = 1, *, effort: float = 0.0
  ) -> Any:
    """XLA's program for a pass over that many rows.

    `effort` is XLA's own setting, from -1 (least) to 1; 0 is its default.
    """
    batch = _placed(pass_shapes(rows, length, slots), self.mesh, BATCH)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rates = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in _RATES}
    small = jax.ShapeDtypeStruct((), jnp.bool_), key, rates
    last, key, rates = _placed(small, self.mesh)
    lowered = self.function.lower(
      self.state, self.sums, self.model.frozen, batch, last, key, rates
    )
    return lowered.compile(dict.fromkeys(_EFFORTS, effort) if effort else None)


_EFFORTS = ("exec_time_optimization_effort", "memory_fitting_effort")
_RATES = ("adapter_lr", "head_lr", "weight_decay")


def architecture(config: ConfigDict) -> BertConfig:
  """Of config.model.name; RoBERTa's two sizes are known without a download."""
  name = config.model.name
  if name in SIZES and not Path(name).exists():
    return BertConfig.from_dict(roberta(*SIZES[name]))
  return load_config(resolve(name))


def describe(config: ConfigDict, parts: Parts, mesh: Mesh, dtype: Any) -> Model:
  """`train.model.build_model`'s result, of shapes with places."""
  module = parts.module
  inputs = input_shapes(1, 8, 1)
  shapes = jax.eval_shape(module.init, jax.random.key(0), **inputs)["params"]
  new = [path for path in flatten_dict(shapes) if path[-1] not in LEAVES]
  names = label_tree(shapes, config.method, new=new)
  stored = _stored(shapes, names, param_shardings(shapes, mesh), dtype)
  trainable, frozen = split(stored, names)
  projections = jax.eval_shape(parts.projections)
  return Model(
    module=module,
    labels=split(names, names)[0],
    counts=count(shapes, names),
    trainable=trainable,
    frozen=Frozen(frozen, _placed(projections, mesh)),
    digest=None,
    notes=(),
  )


def _stored(shapes: Any, names: Any, places: Any, dtype: Any) -> Any:
  """Frozen leaves of the type they are computed with, trained ones float32."""
  kinds, places = flatten_dict(names), flatten_dict(places)
  return unflatten_dict(
    {
      path: jax.ShapeDtypeStruct(
        leaf.shape,
        dtype if kinds[path] == FROZEN else jnp.float32,
        sharding=places[path],
      )
      for path, leaf in flatten_dict(shapes).items()
    }
  )


def _placed(tree: Any, mesh: Mesh, spec: Any = REPLICATED) -> Any:
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    tree,
  )


def step_of(
  config: ConfigDict,
  fields: BertConfig,
  mesh: Mesh,
  dtype: Any,
  *,
  adapter: tuple[Adapter, tuple[str, ...]] | None = None,
) -> Step:
  """The step that a run of this config trains with.

  Args:
    adapter: one that no config makes, and its targets, on a "head" run's base.
  """
  labels = glue_task(config.task).num_labels
  parts = build_module(
    config, fields, num_labels=labels, mesh=mesh, dtype=dtype
  )
  if adapter is not None:
    given, targets = adapter
    module = adapt(parts.base, given, targets=targets)
    parts = Parts(module, parts.base, given, targets)
  model = describe(config, parts, mesh, dtype)
  make: Callable[..., Any] = partial(
    optimiser,
    model.labels,
    steps=_STEPS,
    warmup_ratio=config.optim.warmup_ratio,
    grad_clip=config.optim.grad_clip,
  )
  state = state_shape(model, make(**hyperparameters(config)), mesh)
  one_pass = jit_member_pass(
    state, apply=model.module.apply, optimiser=make, members=1
  )
  return Step(model, state, sums_shape(state), one_pass, mesh)
