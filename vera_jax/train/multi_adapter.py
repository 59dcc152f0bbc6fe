"""One batch in which each row runs with an adapter of its own.

The trained leaves of N adapters are stacked on a leading axis. A batch gathers
those of its rows (for VeRA d, b and the head) and is the ordinary forward
under `jax.vmap`. Base, A and B have no such axis: x W0 and A x stay single
products over all rows, and no array has the size rows x in x out.

A bank (`serve.bank.AdapterBank`) answers so, and its adapters train together,
each on the examples that are its own:

  state = mixed_state(bank.params, tx)
  step = jax.jit(partial(mixed_step, tx=tx, **bank.model), donate_argnums=0)
  batch = pack_by_adapter(tokens, indices, bank.slots(names), layout)
  state, metrics = step(state, bank.frozen, batch, key)
  bank.params = state.params

The bank's adapters all lie on the device (`resident=None`, else `bank.model` is
refused): the optimiser's state belongs to a place in the stack, not to a name.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from vera_jax.tasks.classification import slot_losses
from vera_jax.train.step import Frozen, State, Tree, outputs_of


def empty_stack(leaves: Tree, *, capacity: int) -> Tree:
  """Zeros for `capacity` adapters with leaves of these shapes."""
  return jax.tree.map(
    lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), leaves
  )


@partial(jax.jit, donate_argnums=0)  # the stack is written in place
def set_slot(stack: Tree, slot: Array, leaves: Tree) -> Tree:
  """The stack with one adapter's leaves in a slot."""
  return jax.tree.map(
    lambda stacked, leaf: stacked.at[slot].set(leaf), stack, leaves
  )


@jax.jit
def get_slot(stack: Tree, slot: Array) -> Tree:
  """A copy of one adapter's leaves."""
  return jax.tree.map(lambda stacked: stacked[slot], stack)


def mixed_logits(
  stacked: Tree,
  frozen: Frozen,
  batch: dict[str, Array],
  key: PRNGKeyArray | None = None,
  *,
  module: nn.Module,
  inputs: Sequence[str],
) -> Float[Array, "rows slots labels"]:
  """Logits of every slot of a batch of several adapters.

  Args:
    stacked: the trained leaves, each with the adapters on its leading axis.
    frozen: the base and the projections that all of them share.
    batch: packed, with `adapter` [rows], as from `packing.with_adapters`.
    key: of dropout, which each row draws for itself; None is evaluation.
    module: the adapted module, with the factored plan: any other would make a
      kernel per row.
    inputs: the names of the batch's arrays that the module takes.
  """
  per_row = jax.tree.map(lambda leaf: leaf[batch["adapter"]], stacked)
  rows = {name: batch[name] for name in inputs}
  keys = None if key is None else jax.random.split(key, len(batch["adapter"]))

  def one_row(leaves, row, key):
    row = jax.tree.map(lambda x: x[None], row)
    return outputs_of(module, inputs, leaves, frozen, row, key)[0][0]

  return jax.vmap(one_row)(per_row, rows, keys)


def mixed_losses(
  stacked: Tree,
  frozen: Frozen,
  batch: dict[str, Array],
  key: PRNGKeyArray | None = None,
  **model: Any,
) -> Float[Array, " adapters"]:
  """Each adapter's mean loss over its own examples of the batch; 0 without any.

  They do not depend on one another: the gradient of their sum holds, in
  each adapter's place, the gradient of that adapter trained alone on those
  examples. Arguments as in `mixed_logits`.
  """
  logits = mixed_logits(stacked, frozen, batch, key, **model)
  losses = slot_losses(logits, batch["labels"])

  def own_loss(slot):
    mine = (batch["adapter"] == slot)[:, None] & (batch["example"] >= 0)
    return jnp.sum(jnp.where(mine, losses, 0)) / jnp.maximum(jnp.sum(mine), 1)

  return jax.vmap(own_loss)(jnp.arange(len(jax.tree.leaves(stacked)[0])))


def mixed_state(stacked: Tree, tx: optax.GradientTransformation) -> State:
  """The state of training from here; every adapter has optimiser slots."""
  return State(jnp.int32(0), stacked, jax.vmap(tx.init)(stacked))


def mixed_step(
  state: State,
  frozen: Frozen,
  batch: dict[str, Array],
  dropout_key: PRNGKeyArray,
  *,
  tx: optax.GradientTransformation,
  **model: Any,
) -> tuple[State, dict[str, Array]]:
  """One update of each adapter that the batch names, as if it were alone.

  The optimiser sees one adapter at a time: clipping by the global norm, decay
  and step counts are that adapter's own. Leaves and slots of the others are
  neither read nor written, so a step costs by the size of the batch, not of the
  bank. Donate the state (`jax.jit(..., donate_argnums=0)`), or all of it is
  copied. The leaves must be trained ones, not prepared (`Adapter.prepare`).

  Returns:
    The state, and `loss` [capacity], NaN for adapters that the batch lacks.
  """
  capacity = len(jax.tree.leaves(state.params)[0])
  rows = batch["adapter"]
  slots, slot_of_row = jnp.unique(
    jnp.where(rows < 0, capacity, rows),  # past the end: dropped below
    size=len(rows),
    fill_value=capacity,
    return_inverse=True,
  )
  everyone = state.params, state.opt_state
  params, opt_state = jax.tree.map(
    lambda leaf: leaf.at[slots].get(mode="clip"), everyone
  )
  key = jax.random.fold_in(dropout_key, state.step)
  named = {**batch, "adapter": slot_of_row}

  def loss_of(params):
    losses = mixed_losses(params, frozen, named, key, **model)
    return jnp.sum(losses), losses

  grads, losses = jax.grad(loss_of, has_aux=True)(params)
  updates, opt_state = jax.vmap(tx.update)(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  new = jax.tree.map(
    lambda leaf, part: leaf.at[slots].set(part, mode="drop"),
    everyone,
    (params, opt_state),
  )
  loss = jnp.full(capacity, jnp.nan).at[slots].set(losses, mode="drop")
  return State(state.step + 1, *new), {"loss": loss}
