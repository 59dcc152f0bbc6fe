"""The pure training and evaluation steps.

A training step is one pass over its packed batch, or several whose gradients
add up; then comes the update. The frozen base and the projections are arguments
of their own: no gradient is taken for them, nothing of them is donated or
returned.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Bool, Float, Int, Num, PRNGKeyArray

from vera_jax.labels import join
from vera_jax.models.bert import INPUTS, input_shapes
from vera_jax.train.runtime import compiler_options

Tree = Any


class State(NamedTuple):
  """What training changes: all that a checkpoint holds of the arrays."""

  step: Int[Array, ""]
  params: Tree
  opt_state: optax.OptState


class Sums(NamedTuple):
  """What the passes of a step so far have added up."""

  passes: Int[Array, ""]
  loss: Float[Array, ""]
  grads: Tree


class Frozen(NamedTuple):
  """What training reads: the base's frozen leaves and the projections."""

  params: Tree
  projections: Tree


def pass_shapes(rows: int, length: int, slots: int) -> dict[str, Any]:
  """The arrays of a pass over classes, as shapes."""
  labels = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
  weights = jax.ShapeDtypeStruct((rows, slots), jnp.float32)
  inputs = input_shapes(rows, length, slots)
  return {**inputs, "labels": labels, "weights": weights}


def forward(
  apply: Callable[..., Any],
  params: Tree,
  frozen: Frozen,
  batch: dict[str, Array],
  **kwargs: Any,
) -> Float[Array, "rows slots labels"]:
  """Logits of every slot of a packed batch."""
  variables = {"params": join(params, frozen.params)}
  if frozen.projections:
    variables["projections"] = frozen.projections
  return apply(variables, **{k: batch[k] for k in INPUTS}, **kwargs)


def slot_losses(
  logits: Float[Array, "rows slots labels"], labels: Num[Array, "rows slots"]
) -> Float[Array, "rows slots"]:
  """Cross-entropy for whole-number labels, squared error for float ones."""
  if jnp.issubdtype(labels.dtype, jnp.floating):
    return jnp.square(logits[..., 0] - labels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def weighted_loss(
  logits: Float[Array, "rows slots labels"],
  labels: Num[Array, "rows slots"],
  weights: Float[Array, "rows slots"],
) -> Float[Array, ""]:
  """The examples' losses by their weights: a pass's part of the batch's mean.

  A weight is one over the batch's examples, or 0 in an empty slot.
  """
  losses = slot_losses(logits, labels)
  return jnp.sum(jnp.where(weights > 0, losses * weights, 0))


def no_sums(params: Tree) -> Sums:
  """What a step begins with."""
  zeros = jax.tree.map(jnp.zeros_like, params)
  return Sums(jnp.int32(0), jnp.float32(0), zeros)


def add_pass(
  state: State,
  sums: Sums,
  frozen: Frozen,
  batch: dict[str, Array],
  dropout_key: PRNGKeyArray,
  *,
  apply: Callable[..., Any],
) -> Sums:
  """Adds the loss and the gradient of a pass."""
  key = jax.random.fold_in(dropout_key, state.step)
  rngs = {"dropout": jax.random.fold_in(key, sums.passes)}

  def loss_of(params: Tree) -> Float[Array, ""]:
    logits = forward(
      apply, params, frozen, batch, deterministic=False, rngs=rngs
    )
    return weighted_loss(logits, batch["labels"], batch["weights"])

  loss, grads = jax.value_and_grad(loss_of)(state.params)
  grads = jax.tree.map(jnp.add, sums.grads, grads)
  return Sums(sums.passes + 1, sums.loss + loss, grads)


def update(
  state: State, sums: Sums, *, tx: optax.GradientTransformation
) -> State:
  """The trainable leaves moved by the whole batch's gradient."""
  updates, opt_state = tx.update(sums.grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return State(state.step + 1, params, opt_state)


def figures(sums: Sums) -> dict[str, Float[Array, ""]]:
  return {"loss": sums.loss, "grad_norm": optax.tree.norm(sums.grads)}


def train_step(
  state: State,
  frozen: Frozen,
  passes: Sequence[dict[str, Array]],
  dropout_key: PRNGKeyArray,
  *,
  apply: Callable[..., Any],
  tx: optax.GradientTransformation,
) -> tuple[State, dict[str, Float[Array, ""]]]:
  """One update of the trainable leaves."""
  sums = no_sums(state.params)
  for batch in passes:
    sums = add_pass(state, sums, frozen, batch, dropout_key, apply=apply)
  return update(state, sums, tx=tx), figures(sums)


def train_pass(
  state: State,
  sums: Sums,
  frozen: Frozen,
  batch: dict[str, Array],
  last: Bool[Array, ""],
  dropout_key: PRNGKeyArray,
  *,
  apply: Callable[..., Any],
  tx: optax.GradientTransformation,
) -> tuple[State, Sums, dict[str, Float[Array, ""]]]:
  """A pass of `train_step`, which ends with the update if it is the last."""
  sums = add_pass(state, sums, frozen, batch, dropout_key, apply=apply)
  state = jax.lax.cond(
    last, partial(update, tx=tx), lambda state, _: state, state, sums
  )
  return state, sums, figures(sums)


def member_pass(
  state: State,
  sums: Sums,
  frozen: Frozen,
  batch: dict[str, Array],
  last: Bool[Array, ""],
  dropout_key: PRNGKeyArray,
  rates: dict[str, Float[Array, ""]],
  *,
  apply: Callable[..., Any],
  optimiser: Callable[..., optax.GradientTransformation],
) -> tuple[State, Sums, dict[str, Float[Array, ""]]]:
  """`train_pass` with the optimiser's numbers, by name, as arguments."""
  tx = optimiser(**rates)
  return train_pass(
    state, sums, frozen, batch, last, dropout_key, apply=apply, tx=tx
  )


def jit_train_pass(
  state: State, *, apply: Callable[..., Any], tx: optax.GradientTransformation
) -> Any:
  """`train_pass`, compiled; state and sums are donated, and stay in place."""
  return _jit(partial(train_pass, apply=apply, tx=tx), state)


def jit_train_step(
  state: State, *, apply: Callable[..., Any], tx: optax.GradientTransformation
) -> "Step":
  """`train_step`, compiled once for each row count that a pass may have."""
  return Step(jit_train_pass(state, apply=apply, tx=tx), no_sums, state)


def jit_member_pass(
  state: Tree,
  *,
  apply: Callable[..., Any],
  optimiser: Callable[..., optax.GradientTransformation],
  members: int,
) -> Any:
  """`member_pass` for a group of runs, compiled as `jit_train_pass` is.

  Every argument but the frozen leaves and `last` has a first axis of length
  `members`; in a group of one nothing has (`crew.py`).
  """
  one_pass = partial(member_pass, apply=apply, optimiser=optimiser)
  if members > 1:
    one_pass = jax.vmap(one_pass, in_axes=(0, 0, None, 0, None, 0, 0))
  return _jit(one_pass, state)


def jit_member_step(
  state: Tree,
  *,
  apply: Callable[..., Any],
  optimiser: Callable[..., optax.GradientTransformation],
  members: int,
) -> "Step":
  """A step of a group: (state, frozen, passes, dropout keys, rates)."""
  one_pass = jit_member_pass(
    state, apply=apply, optimiser=optimiser, members=members
  )
  begin = jax.vmap(no_sums) if members > 1 else no_sums
  return Step(one_pass, begin, state)


class Step:
  """A step in passes: (state, frozen, passes, *own) -> (state, figures).

  `one_pass` is compiled, `begin` gives the sums that a step begins with.
  """

  def __init__(
    self, one_pass: Any, begin: Callable[[Tree], Sums], state: Tree
  ) -> None:
    self._pass = one_pass
    self._state = jax.tree.map(_shape, state)
    shardings = _sums_like(jax.tree.map(lambda leaf: leaf.sharding, state))
    self._begin = jax.jit(begin, out_shardings=shardings)
    self._sums = jax.tree.map(
      lambda leaf, place: leaf.update(sharding=place),
      jax.eval_shape(begin, state.params),
      shardings,
    )

  def __call__(
    self, state: Tree, frozen: Frozen, passes: Sequence[Any], *own: Any
  ) -> tuple[Tree, dict[str, Array]]:
    sums = self._begin(state.params)
    for number, batch in enumerate(passes, 1):
      last = np.bool_(number == len(passes))
      state, sums, told = self._pass(state, sums, frozen, batch, last, *own)
    return state, told

  def lower(self, frozen: Frozen, batch: Any, *own: Any) -> Any:
    """The program of passes of the batch's shape, to be compiled."""
    last = np.bool_(True)
    return self._pass.lower(self._state, self._sums, frozen, batch, last, *own)


def _shape(leaf: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _jit(one_pass: Callable[..., Any], state: Tree) -> Any:
  """Left to itself, XLA moves small leaves to where a weight's shards are: the
  next step would be compiled anew. The figures lie where the step count does.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  out = shardings, _sums_like(shardings), shardings.step
  return jax.jit(
    one_pass,
    donate_argnums=(0, 1),
    out_shardings=out,
    compiler_options=compiler_options(),
  )


def _sums_like(shardings: Any) -> Any:
  return Sums(shardings.step, shardings.step, shardings.params)


def eval_step(
  params: Tree,
  frozen: Frozen,
  batch: dict[str, Array],
  *,
  apply: Callable[..., Any],
) -> Float[Array, "rows slots labels"]:
  """Logits without dropout."""
  return forward(apply, params, frozen, batch, deterministic=True)
