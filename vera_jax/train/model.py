"""The model of a run: pretrained base, the method's adapter, a new head.

Made by eval_shape -> shardings -> jitted init. A leaf's value comes from, first
that applies: a checkpoint of this run (the loop restores it), the pretrained
files, fresh random numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import DictKey
from ml_collections import ConfigDict

from vera_jax.adapters.apply import adapt, find_targets
from vera_jax.adapters.interface import Adapter
from vera_jax.adapters.labels import (
  FROZEN,
  Counts,
  count,
  join,
  label_tree,
  split,
)
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.projections import digest
from vera_jax.errors import UserError
from vera_jax.models.bert import (
  INPUTS,
  BertClassifier,
  BertConfig,
  input_shapes,
)
from vera_jax.models.hf_weights import (
  LEAVES,
  Loaded,
  load_config,
  load_params,
  refuse_gaps,
)
from vera_jax.train.sharding import (
  REPLICATED,
  check_heads,
  param_shardings,
  put,
)
from vera_jax.train.step import Frozen, State


class Model(NamedTuple):
  """The module to apply and its parameters.

  `labels` covers the trainable leaves; `digest` is the projections'; `notes`
  say which weights found no partner in the checkpoint or in the model; `fresh`
  are the paths of the leaves that started from random values.
  """

  module: nn.Module
  labels: dict[str, Any]
  counts: Counts
  trainable: dict[str, Any]
  frozen: Frozen
  digest: str | None
  notes: tuple[str, ...]
  fresh: tuple[tuple[str, ...], ...] = ()


def build_adapter(
  config: ConfigDict,
) -> tuple[Adapter | None, tuple[str, ...]]:
  """The method's adapter and targets; None where it trains the base itself."""
  return make_adapter(
    config.method,
    config[config.method].to_dict(),
    plan=config.model.contraction,
    forwards=1 if config.model.remat == "none" else 2,
  )


def compute_dtype(name: str) -> Any:
  """ "auto" is float32 on CPU and bfloat16 on accelerators."""
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  if name not in ("float32", "bfloat16"):
    raise UserError(
      f"config.model.dtype is {name!r}; choose auto, float32 or bfloat16."
    )
  return jnp.dtype(name)


def _shapes(module: nn.Module) -> dict[tuple[str, ...], Any]:
  """The shapes of a module's parameters, by path."""
  inputs = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in INPUTS}
  shapes = jax.eval_shape(module.init, jax.random.key(0), **inputs)
  return flatten_dict(shapes["params"])


def _fresh(module: nn.Module, paths: list[tuple[str, ...]], seed: int) -> Any:
  """Random first values of some leaves; XLA drops the work for the others."""

  @jax.jit
  def init(key):
    inputs: dict[str, Any]
    inputs = {name: jnp.zeros((1, 8), jnp.int32) for name in INPUTS}
    params = flatten_dict(module.init(key, **inputs)["params"])
    return [params[path] for path in paths]

  return dict(zip(paths, init(jax.random.key(seed)), strict=True))


def _announce(loaded: Loaded, fresh: list[tuple[str, ...]]) -> Iterator[str]:
  new = sorted("/".join(path) for path in fresh if path[-1] in LEAVES)
  if new:
    yield f"new, trained from random values: {', '.join(new)}"
  for what, names in (
    ("not used, no such parameter here", loaded.unexpected),
    ("not used, not part of a classifier", loaded.dropped),
  ):
    if names:
      yield f"{what}: {', '.join(names)}"


class Parts(NamedTuple):
  """A module, and what it was made of."""

  module: nn.Module
  base: BertClassifier
  adapter: Adapter | None
  targets: tuple[str, ...]

  def projections(self) -> Any:
    """The `projections` collection; empty where no adapter has one."""
    if self.adapter is None:
      return {}
    inputs = input_shapes(1, 8, 1)
    return self.adapter.projections(
      find_targets(self.base, self.targets, **inputs)
    )


def build_module(
  config: ConfigDict,
  fields: BertConfig,
  *,
  num_labels: int,
  mesh: Mesh,
  dtype: Any,
) -> Parts:
  """The architecture with the method's adapter on it; no weights."""
  check_heads(fields.num_attention_heads, mesh)
  base = BertClassifier(
    fields,
    num_labels,
    dtype=dtype,
    param_dtype=dtype,
    scan=config.model.scan,
    remat=config.model.remat,
  )
  adapter, targets = build_adapter(config)
  module = base if adapter is None else adapt(base, adapter, targets=targets)
  return Parts(module, base, adapter, targets)


def build_model(
  config: ConfigDict, *, folder: Path, num_labels: int, mesh: Mesh
) -> Model:
  """The pretrained base with the method's adapter and a new head on it."""
  dtype = compute_dtype(config.model.dtype)
  fields = load_config(folder)
  parts = build_module(
    config, fields, num_labels=num_labels, mesh=mesh, dtype=dtype
  )
  module = parts.module
  shapes = _shapes(module)

  # Frozen leaves are stored as they are computed with, trained ones in float32.
  first = flatten_dict(label_tree(unflatten_dict(shapes), config.method))
  template = {
    path: jax.ShapeDtypeStruct(
      leaf.shape, dtype if first[path] == FROZEN else jnp.float32
    )
    for path, leaf in shapes.items()
    if path[-1] in LEAVES  # the adapter's have names of their own
  }
  loaded = load_params(folder, unflatten_dict(template))
  refuse_gaps(folder, loaded.missing)
  given = flatten_dict(loaded.params)
  fresh = [path for path in shapes if path not in given]
  labels = label_tree(unflatten_dict(shapes), config.method, new=fresh)
  params = unflatten_dict({**given, **_fresh(module, fresh, config.seed)})
  params = put(params, param_shardings(params, mesh))
  trainable, frozen = split(params, labels)
  projections = parts.projections()
  everywhere = NamedSharding(mesh, REPLICATED)
  return Model(
    module=module,
    labels=split(labels, labels)[0],
    counts=count(params, labels),
    trainable=trainable,
    frozen=Frozen(frozen, put(projections, everywhere)),
    digest=digest(projections) if projections else None,
    notes=tuple(_announce(loaded, fresh)),
    fresh=tuple(fresh),
  )


def start_of(model: Model, config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """The trainable leaves that a model of this config starts from.

  The config may differ from the model's own in the values that leaves start
  from: the seed, VeRA's `d_init`.
  """
  module = model.module
  adapter, _ = build_adapter(config)
  if adapter is not None:
    module = module.clone(adapter=adapter)
  fresh = unflatten_dict(_fresh(module, list(model.fresh), config.seed))
  return join(model.trainable, put(fresh, param_shardings(fresh, mesh)))


def state_shape(
  model: Model, tx: optax.GradientTransformation, mesh: Mesh
) -> Any:
  """A `State` of shapes and places; a slot lies where its leaf lies."""
  everywhere = NamedSharding(mesh, REPLICATED)
  leaves = flatten_dict(model.trainable)

  def place(path: tuple[Any, ...], slot: Any) -> jax.ShapeDtypeStruct:
    names = tuple(key.key for key in path if isinstance(key, DictKey))
    leaf = leaves.get(names[1:])  # the first name is optax's: the label
    sharding = everywhere if leaf is None else leaf.sharding
    return jax.ShapeDtypeStruct(slot.shape, slot.dtype, sharding=sharding)

  step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  params = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    model.trainable,
  )
  slots = jax.eval_shape(tx.init, model.trainable)
  return State(step, params, jax.tree_util.tree_map_with_path(place, slots))


def init_state(
  model: Model, tx: optax.GradientTransformation, mesh: Mesh
) -> State:
  """Step 0."""
  shape = state_shape(model, tx, mesh)
  slots = jax.tree.map(lambda leaf: leaf.sharding, shape.opt_state)
  opt_state = jax.jit(tx.init, out_shardings=slots)(model.trainable)
  step = put(np.int32(0), shape.step.sharding)
  return State(step, model.trainable, opt_state)
