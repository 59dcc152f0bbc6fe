"""The pure training and evaluation steps.

The frozen base and the projections are arguments of their own: no gradient is
taken for them, nothing of them is donated or returned.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int, Num, PRNGKeyArray

from vera_jax.labels import join
from vera_jax.models.bert import INPUTS

Tree = Any


class State(NamedTuple):
  """What training changes: all that a checkpoint holds of the arrays."""

  step: Int[Array, ""]
  params: Tree
  opt_state: optax.OptState


class Frozen(NamedTuple):
  """What training reads: the base's frozen leaves and the projections."""

  params: Tree
  projections: Tree


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


def mean_loss(
  logits: Float[Array, "rows slots labels"],
  labels: Num[Array, "rows slots"],
  example: Int[Array, "rows slots"],
) -> Float[Array, ""]:
  """Mean over the batch's examples; `example` is -1 in empty slots.

  Cross-entropy for whole-number labels, squared error for float ones.
  """
  if jnp.issubdtype(labels.dtype, jnp.floating):
    losses = jnp.square(logits[..., 0] - labels)
  else:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  real = example >= 0
  return jnp.sum(jnp.where(real, losses, 0)) / jnp.maximum(jnp.sum(real), 1)


def train_step(
  state: State,
  frozen: Frozen,
  batch: dict[str, Array],
  dropout_key: PRNGKeyArray,
  *,
  apply: Callable[..., Any],
  tx: optax.GradientTransformation,
) -> tuple[State, dict[str, Float[Array, ""]]]:
  """One update of the trainable leaves."""
  rngs = {"dropout": jax.random.fold_in(dropout_key, state.step)}

  def loss_of(params: Tree) -> Float[Array, ""]:
    logits = forward(
      apply, params, frozen, batch, deterministic=False, rngs=rngs
    )
    return mean_loss(logits, batch["labels"], batch["example"])

  loss, grads = jax.value_and_grad(loss_of)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
  return State(state.step + 1, params, opt_state), metrics


def jit_train_step(
  state: State, *, apply: Callable[..., Any], tx: optax.GradientTransformation
) -> Any:
  """`train_step`, compiled; the state is donated and stays where it lies."""
  return _jit(partial(train_step, apply=apply, tx=tx), state)


def member_step(
  state: State,
  frozen: Frozen,
  batch: dict[str, Array],
  dropout_key: PRNGKeyArray,
  rates: dict[str, Float[Array, ""]],
  *,
  apply: Callable[..., Any],
  optimiser: Callable[..., optax.GradientTransformation],
) -> tuple[State, dict[str, Float[Array, ""]]]:
  """`train_step` with the optimiser's numbers, by name, as arguments."""
  tx = optimiser(**rates)
  return train_step(state, frozen, batch, dropout_key, apply=apply, tx=tx)


def jit_member_step(
  state: Tree,
  *,
  apply: Callable[..., Any],
  optimiser: Callable[..., optax.GradientTransformation],
  members: int,
) -> Any:
  """`member_step` for a group of runs, compiled as `jit_train_step` is.

  Every argument but the frozen leaves has a first axis of length `members`; in
  a group of one nothing has (`stack.py`).
  """
  step = partial(member_step, apply=apply, optimiser=optimiser)
  if members > 1:
    step = jax.vmap(step, in_axes=(0, None, 0, 0, 0))
  return _jit(step, state)


def _jit(step: Callable[..., Any], state: Tree) -> Any:
  """Left to itself, XLA moves small leaves to where a weight's shards are: the
  next step would be compiled anew. The figures lie where the step count does.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  out = shardings, shardings.step
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def eval_step(
  params: Tree,
  frozen: Frozen,
  batch: dict[str, Array],
  *,
  apply: Callable[..., Any],
) -> Float[Array, "rows slots labels"]:
  """Logits without dropout."""
  return forward(apply, params, frozen, batch, deterministic=True)
