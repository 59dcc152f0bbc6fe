"""The training step, compiled in parts, for one run or several at once.

Steps differ in the number of their microbatches and in the shapes of these. A
program for each combination would be compiled again and again; so there is one
per shape of a microbatch, which adds its gradient to those before, and one for
the update.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered, Traced
from jax.tree_util import DictKey, KeyPath
from jaxtyping import PRNGKeyArray

from vera_jax.pretrained.blueprint import Model
from vera_jax.pretrained.sharding import REPLICATED
from vera_jax.train.each_run import each_run
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
    outputs: Callable[..., tuple[Tree, Array]],
    loss: Callable[[Tree, Batch], tuple[Array, Array]],
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
    # `train_step` cut in two where all gradients are added up
    start: Callable[..., Sums] = partial(no_sums, shards=shards)
    add: Callable[..., Sums] = partial(_add, gradient=gradient)
    update: Callable[..., tuple[State, Metrics]] = partial(_update, step=step)
    whole: Callable[..., tuple[State, Metrics]] = partial(
      step, gradient=gradient
    )
    if runs is not None:
      start = each_run(start, shards.mesh, in_axes=(0,))
      update = each_run(update, shards.mesh, in_axes=(0, 0, 0, 0))
      # the frozen leaves and a microbatch's number are the same for all runs
      add = each_run(add, shards.mesh, in_axes=(0, 0, None, 0, 0, None))
      whole = each_run(whole, shards.mesh, in_axes=(0, None, 0, 0, 0))
    # Left to itself, XLA moves small leaves to where a weight's shards are, and
    # the next step would be compiled anew. So all results have a sharding.
    behind = partial(shards.behind, front=front)
    each: Tree = behind(shardings.step)
    sums = Sums(each, each, jax.tree.map(behind, shardings.params))
    moved = shardings, shardings.step
    (device, *_) = shardings.step.device_set
    jit = partial(jax.jit, compiler_options=compiler_options(device.platform))
    self._start = jax.jit(start, out_shardings=sums)
    self._add = jit(add, donate_argnums=0, out_shardings=sums)
    self._update = jit(update, donate_argnums=0, out_shardings=moved)
    self._one_program = jit(whole, donate_argnums=0, out_shardings=moved)
    self._sums = jax.tree.map(
      lambda leaf, sharding: leaf.update(sharding=sharding),
      jax.eval_shape(self._start, self._state.params),
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
    sums = self._start(state.params)
    for number, batch in enumerate(microbatches):
      sums = self._add(sums, state, frozen, batch, key, np.int32(number))
    return self._update(state, sums, key, rates)

  def trace(
    self, frozen: Frozen, batch: Mapping[str, Leaf], key: Leaf
  ) -> Traced:
    """The program of a microbatch of this shape, to be compiled ahead."""
    first = np.int32(0)
    return self._add.trace(self._sums, self._state, frozen, batch, key, first)

  def lower_whole(
    self,
    frozen: Frozen,
    batch: Mapping[str, Leaf],
    key: Leaf,
    rates: Mapping[str, Leaf],
  ) -> Lowered:
    """A step of one microbatch as a single program, to be counted."""
    return self._one_program.lower(self._state, frozen, [batch], key, rates)


def _shape(leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _add(
  sums: Sums,
  state: State,
  frozen: Frozen,
  batch: Batch,
  key: Array,
  number: Array,
  *,
  gradient: Callable[..., Sums],
) -> Sums:
  """Adds the gradient of a step's microbatch of this number."""
  key = microbatch_key(key, state, number)
  one = gradient(state.params, frozen, batch, key)
  return jax.tree.map(jnp.add, sums, one)


def _update(
  state: State,
  sums: Sums,
  key: Array,
  rates: Mapping[str, Array],
  *,
  step: Callable[..., tuple[State, Metrics]],
) -> tuple[State, Metrics]:
  """A step whose only microbatch is known by its gradient, `sums`."""

  def known(
    params: Tree, frozen: Frozen, sums: Sums, key: PRNGKeyArray
  ) -> Sums:
    return sums

  return step(state, Frozen({}, {}), [sums], key, rates, gradient=known)


def state_shape(
  model: Model, tx: optax.GradientTransformation, mesh: Mesh
) -> State:
  """A `State` of shapes and shardings: a slot lies where its leaf lies."""
  everywhere = NamedSharding(mesh, REPLICATED)
  leaves = {
    tuple(key.key for key in path): leaf.sharding
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.trainable)
  }

  def with_sharding(
    path: KeyPath, slot: jax.ShapeDtypeStruct
  ) -> jax.ShapeDtypeStruct:
    names = tuple(key.key for key in path if isinstance(key, DictKey))
    # the first name is optax's: the label
    sharding = leaves.get(names[1:], everywhere)
    return jax.ShapeDtypeStruct(slot.shape, slot.dtype, sharding=sharding)

  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  params = jax.tree.map(_shape, model.trainable)
  slots = jax.eval_shape(tx.init, params)
  return State(
    step, params, jax.tree_util.tree_map_with_path(with_sharding, slots)
  )


def init_state(
  params: Tree, tx: optax.GradientTransformation, shape: State
) -> State:
  """Step 0 of these leaves; `shape` is `state_shape`'s."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shape)
  opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
  step = jax.device_put(jnp.int32(0), shardings.step)
  return State(step, params, opt_state)
