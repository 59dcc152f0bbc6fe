"""The pure training step, and the same compiled for a run or an ensemble.

A step is one microbatch, or several whose gradients add up, and then one
update. Over several devices each data shard keeps a gradient of its own until
the update, where all are added at once (`shards.py`). The frozen base and the
projections are arguments of their own: no gradient is taken for them, nothing
of them is donated or returned.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import DictKey
from jaxtyping import Float, Int, Key, PRNGKeyArray

from vera_jax.adapters.intercept import KEYS, PENALTIES
from vera_jax.adapters.labels import join
from vera_jax.pretrained.blueprint import Model
from vera_jax.pretrained.sharding import REPLICATED
from vera_jax.train.runtime import compiler_options
from vera_jax.train.shards import (
  ONE,
  Shards,
  divide,
  rows_stay,
  shards_of,
  total,
)

Tree = Any
Batch = Mapping[str, Array | np.ndarray]


class State(NamedTuple):
  """What training changes: all that a checkpoint holds of the arrays."""

  step: Any  # int32 [*runs]; a shape in a `State` of shapes
  params: Tree
  opt_state: optax.OptState


class Frozen(NamedTuple):
  """What training reads: the base's frozen leaves and the projections."""

  params: Tree
  projections: Tree


class Sums(NamedTuple):
  """What a step's microbatches have added up, with an axis for data shards."""

  microbatches: Int[Array, "*runs"]
  loss: Float[Array, "*shards"]
  examples: Float[Array, "*shards"]
  grads: Tree


def outputs_of(
  module: Any,
  inputs: Sequence[str],
  params: Tree,
  frozen: Frozen,
  batch: Batch,
  key: PRNGKeyArray | None = None,
) -> tuple[Any, Float[Array, ""]]:
  """(the model's outputs on a packed batch, its methods' penalties).

  `inputs` names the batch's arrays that the module takes; `key` is that of
  dropout and of methods that draw random numbers, None outside of training.
  """
  variables = {"params": join(params, frozen.params)}
  if frozen.projections:
    variables["projections"] = frozen.projections
  rngs = None
  if key is not None:
    rngs = {"dropout": key, KEYS: jax.random.fold_in(key, 1)}
  outputs, sown = module.apply(
    variables,
    **{name: batch[name] for name in inputs},
    deterministic=key is None,
    rngs=rngs,
    mutable=[PENALTIES],
  )
  penalties = [jnp.sum(leaf) for leaf in jax.tree.leaves(sown)]
  return outputs, sum(penalties, start=jnp.float32(0))


def no_sums(params: Tree, *, shards: Shards = ONE) -> Sums:
  """What a step begins with."""
  front = (shards.number,) if shards.number > 1 else ()
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(front + leaf.shape, leaf.dtype), params
  )
  return Sums(jnp.int32(0), jnp.zeros(front), jnp.zeros(front), zeros)


def accumulate(
  sums: Sums,
  state: State,
  frozen: Frozen,
  batch: Batch,
  key: PRNGKeyArray,
  *,
  outputs: Callable[..., tuple[Any, Array]],
  loss: Callable[[Any, Batch], tuple[Array, Array]],
  shards: Shards = ONE,
) -> Sums:
  """Adds a microbatch's loss and gradient, for each data shard its own."""
  key = jax.random.fold_in(key, state.step)
  key = jax.random.fold_in(key, sums.microbatches)

  def summed_loss(params: Tree, batch: Batch, key: PRNGKeyArray):
    with rows_stay(shards):
      found, penalty = outputs(params, frozen, batch, key)
    total, count = loss(found, batch)
    return total + penalty * count, count  # the penalty once per mean loss

  differentiate = jax.value_and_grad(summed_loss, has_aux=True)
  if shards.number > 1:
    differentiate = jax.vmap(
      differentiate, in_axes=(None, 0, 0), spmd_axis_name=shards.axes
    )
    batch, key = divide(batch, shards), jax.random.split(key, shards.number)
  (total, count), grads = differentiate(state.params, batch, key)
  return Sums(
    sums.microbatches + 1,
    sums.loss + total,
    sums.examples + count,
    jax.tree.map(jnp.add, sums.grads, grads),
  )


def update(
  state: State,
  sums: Sums,
  rates: Mapping[str, Float[Array, ""]],
  *,
  optimiser: Callable[..., optax.GradientTransformation],
  shards: Shards = ONE,
) -> tuple[State, dict[str, Float[Array, ""]]]:
  """Moves the trainable leaves by the mean gradient of the whole batch."""
  loss, count, grads = total(sums.loss, sums.examples, sums.grads, shards)
  count = jnp.maximum(count, 1)
  grads = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), grads)
  tx = optimiser(**rates)
  moves, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, moves)
  metrics = {"loss": loss / count, "grad_norm": optax.tree.norm(grads)}
  return State(state.step + 1, params, opt_state), metrics


def train_step(
  state: State,
  frozen: Frozen,
  microbatches: Sequence[Batch],
  key: Key[Array, "*runs"],
  rates: Mapping[str, Float[Array, "*runs"]],
  *,
  start: Callable[..., Sums] = no_sums,
  accumulate: Callable[..., Sums],
  update: Callable[..., tuple[State, dict[str, Array]]],
) -> tuple[State, dict[str, Array]]:
  """One step: gradients of all microbatches, then one update."""
  sums = start(state.params)
  for batch in microbatches:
    sums = accumulate(sums, state, frozen, batch, key)
  return update(state, sums, rates)


class Step:
  """`train_step` with compiled parts: (state, frozen, microbatches, key, rates)
  -> (state, metrics). The state is donated.

  With `runs`, every array but the frozen ones has a leading axis, one entry per
  run of an ensemble.
  """

  def __init__(
    self,
    state: Any,
    *,
    outputs: Callable[..., tuple[Any, Array]],
    loss: Callable[[Any, Batch], tuple[Array, Array]],
    optimiser: Callable[..., optax.GradientTransformation],
    runs: int | None = None,
  ) -> None:
    """`state` says by its arrays, or their shapes, where everything lies."""
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    front = 0 if runs is None else 1
    shards = shards_of(jax.tree.leaves(places.params), front=front)
    start = partial(no_sums, shards=shards)
    add = partial(accumulate, outputs=outputs, loss=loss, shards=shards)
    move = partial(update, optimiser=optimiser, shards=shards)
    if runs is not None:
      start = jax.vmap(start)
      add = jax.vmap(add, in_axes=(0, 0, None, 0, 0))
      move = jax.vmap(move)

    # Left to itself, XLA moves small leaves to where a weight's shards are, and
    # the next step would be compiled anew.
    behind = partial(shards.behind, front=front)
    per_shard = behind(places.step)
    sums = Sums(
      places.step, per_shard, per_shard, jax.tree.map(behind, places.params)
    )
    (device, *_) = places.step.device_set
    self._options = compiler_options(device.platform)

    def compiled(options: Any) -> dict[str, Any]:
      jit = partial(jax.jit, compiler_options=options)
      return {
        "start": jax.jit(start, out_shardings=sums),
        "accumulate": jit(add, donate_argnums=0, out_shardings=sums),
        "update": jit(
          move, donate_argnums=0, out_shardings=(places, places.step)
        ),
      }

    self._parts = compiled(self._options)
    self._inner_parts = compiled(None)  # a jit inside a jit takes no options
    self._state = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding
      ),
      state,
    )
    self._sums = jax.tree.map(
      lambda leaf, place: leaf.update(sharding=place),
      jax.eval_shape(self._parts["start"], self._state.params),
      sums,
    )

  def __call__(
    self,
    state: State,
    frozen: Frozen,
    microbatches: Sequence[Batch],
    key: Key[Array, "*runs"],
    rates: Mapping[str, Array],
  ) -> tuple[State, dict[str, Array]]:
    return train_step(state, frozen, microbatches, key, rates, **self._parts)

  def lower(self, frozen: Frozen, batch: Any, key: Any) -> Any:
    """The program of a microbatch of this shape, to be compiled ahead."""
    accumulate = self._parts["accumulate"]
    return accumulate.lower(self._sums, self._state, frozen, batch, key)

  def lower_whole(
    self, frozen: Frozen, batch: Any, key: Any, rates: Any
  ) -> Any:
    """A step of one microbatch as a single program, to be counted."""

    def step(state, frozen, batch, key, rates):
      parts = self._inner_parts
      return train_step(state, frozen, [batch], key, rates, **parts)

    whole = jax.jit(step, donate_argnums=0, compiler_options=self._options)
    return whole.lower(self._state, frozen, batch, key, rates)


def state_shape(
  model: Model, tx: optax.GradientTransformation, mesh: Mesh
) -> Any:
  """A `State` of shapes and places; a slot lies where its leaf lies."""
  everywhere = NamedSharding(mesh, REPLICATED)
  leaves = {
    tuple(key.key for key in path): leaf.sharding
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.trainable)
  }

  def place(path: tuple[Any, ...], slot: Any) -> jax.ShapeDtypeStruct:
    names = tuple(key.key for key in path if isinstance(key, DictKey))
    # the first name is optax's: the label
    sharding = leaves.get(names[1:], everywhere)
    return jax.ShapeDtypeStruct(slot.shape, slot.dtype, sharding=sharding)

  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  params = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    model.trainable,
  )
  slots = jax.eval_shape(tx.init, params)
  return State(step, params, jax.tree_util.tree_map_with_path(place, slots))


def init_state(
  params: Tree, tx: optax.GradientTransformation, shape: State
) -> State:
  """Step 0 of these leaves; `shape` is `state_shape`'s."""
  places = jax.tree.map(lambda leaf: leaf.sharding, shape)
  opt_state = jax.jit(tx.init, out_shardings=places.opt_state)(params)
  step = jax.device_put(jnp.int32(0), places.step)
  return State(step, params, opt_state)
