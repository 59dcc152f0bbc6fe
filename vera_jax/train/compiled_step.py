"""The training step, compiled in parts, for one run or several at once.

Steps differ in the number of their microbatches and in the shapes of these. A
program for each combination would be compiled again and again; so there is one
per shape of a microbatch, which adds its gradient to those before, and one for
the update.
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
from jax.stages import Lowered
from jax.tree_util import DictKey

from vera_jax.pretrained.blueprint import Model
from vera_jax.pretrained.sharding import REPLICATED
from vera_jax.train.runtime import compiler_options
from vera_jax.train.shards import no_sums, per_shard, shards_of, total
from vera_jax.train.step import (
  Batch,
  Frozen,
  Metrics,
  State,
  Sums,
  Tree,
  microbatch_gradient,
  microbatch_key,
  train_step,
)

# an array, or its shape, for what is only lowered
Leaf = Array | np.ndarray | jax.ShapeDtypeStruct


class Parts(NamedTuple):
  """A step as three functions, which can be compiled apart.

  Attributes:
    start: (params) -> the `Sums` that a step begins with.
    add: (sums, state, frozen, microbatch, key, its number) -> sums.
    update: (state, sums, key, rates) -> (state, metrics).
  """

  start: Any
  add: Any
  update: Any


class CompiledStep:
  """`train_step` with compiled parts: (state, frozen, microbatches, key, rates)
  -> (state, metrics). The state is donated.

  With `runs`, every array but the frozen ones has a leading axis, one entry per
  run of an ensemble.
  """

  def __init__(
    self,
    state: State,
    *,
    outputs: Callable[..., tuple[Any, Array]],
    loss: Callable[[Any, Batch], tuple[Array, Array]],
    optimiser: Callable[..., optax.GradientTransformation],
    runs: int | None = None,
  ) -> None:
    """Make the parts; each is compiled when it is first called.

    Args:
      state: its arrays, or their shapes, say where everything lies.
      outputs, loss: of the model and the task, as for `microbatch_gradient`.
      optimiser: as for `train_step`.
      runs: how many are trained at once; None for one, without an axis.
    """
    self._state = jax.tree.map(_shape, state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self._state)
    front = 0 if runs is None else 1
    shards = shards_of(jax.tree.leaves(shardings.params), front=front)
    gradient = per_shard(
      partial(microbatch_gradient, outputs=outputs, loss=loss), shards
    )
    step = partial(
      train_step, optimiser=optimiser, reduce=partial(total, shards=shards)
    )
    parts = _parts(step, gradient, partial(no_sums, shards=shards))
    if runs is not None:
      parts = Parts(
        jax.vmap(parts.start),
        jax.vmap(parts.add, in_axes=(0, 0, None, 0, 0, None)),
        jax.vmap(parts.update),
      )
    # Left to itself, XLA moves small leaves to where a weight's shards are, and
    # the next step would be compiled anew. So all results have a sharding.
    behind = partial(shards.behind, front=front)
    each = behind(shardings.step)
    sums = Sums(each, each, jax.tree.map(behind, shardings.params))
    moved = shardings, shardings.step
    (device, *_) = shardings.step.device_set
    jit: Any = partial(
      jax.jit, compiler_options=compiler_options(device.platform)
    )
    self._parts = Parts(
      jax.jit(parts.start, out_shardings=sums),
      jit(parts.add, donate_argnums=0, out_shardings=sums),
      jit(parts.update, donate_argnums=0, out_shardings=moved),
    )
    whole = partial(step, gradient=gradient)
    self._whole = jit(whole, donate_argnums=0, out_shardings=moved)
    self._sums = jax.tree.map(
      lambda leaf, sharding: leaf.update(sharding=sharding),
      jax.eval_shape(self._parts.start, self._state.params),
      sums,
    )

  def __call__(
    self,
    state: State,
    frozen: Frozen,
    microbatches: Sequence[Batch],
    key: Array,
    rates: Mapping[str, Array],
  ) -> tuple[State, Metrics]:
    sums = self._parts.start(state.params)
    for number, batch in enumerate(microbatches):
      sums = self._parts.add(sums, state, frozen, batch, key, np.int32(number))
    return self._parts.update(state, sums, key, rates)

  def lower(
    self, frozen: Frozen, batch: Mapping[str, Leaf], key: Leaf
  ) -> Lowered:
    """The program of a microbatch of this shape, to be compiled ahead."""
    first = np.int32(0)
    add = self._parts.add
    return add.lower(self._sums, self._state, frozen, batch, key, first)

  def lower_whole(
    self,
    frozen: Frozen,
    batch: Mapping[str, Leaf],
    key: Leaf,
    rates: Mapping[str, Leaf],
  ) -> Lowered:
    """One run's step of one microbatch as a single program, to be counted."""
    return self._whole.lower(self._state, frozen, [batch], key, rates)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _parts(
  step: Callable[..., tuple[State, Metrics]],
  gradient: Callable[..., Sums],
  start: Callable[[Tree], Sums],
) -> Parts:
  """`train_step` cut in two where all gradients are added up."""

  def add(sums, state, frozen, batch, key, number):
    key = microbatch_key(key, state, number)
    one = gradient(state.params, frozen, batch, key)
    return jax.tree.map(jnp.add, sums, one)

  def update(state, sums, key, rates):
    # a step whose only microbatch is known by its gradient
    def known(params, frozen, sums, key):
      return sums

    none = Frozen({}, {})
    return step(state, none, [sums], key, rates, gradient=known)

  return Parts(start, add, update)


def state_shape(
  model: Model, tx: optax.GradientTransformation, mesh: Mesh
) -> State:
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
  params = jax.tree.map(_shape, model.trainable)
  slots = jax.eval_shape(tx.init, params)
  return State(step, params, jax.tree_util.tree_map_with_path(place, slots))


def init_state(
  params: Tree, tx: optax.GradientTransformation, shape: State
) -> State:
  """Step 0 of these leaves; `shape` is `state_shape`'s."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shape)
  opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
  step = jax.device_put(jnp.int32(0), shardings.step)
  return State(step, params, opt_state)
