"""The training step: the gradients of all microbatches, then one update.

The frozen base and the projections are arguments of their own: no gradient is
taken for them, and nothing of them is returned. `compiled_step.py` compiles
this step, `shards.py` spreads it over a mesh.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, Key, PRNGKeyArray

from vera_jax.adapters.intercept import KEYS, PENALTIES
from vera_jax.adapters.labels import join

Tree = Any
Batch = Mapping[str, Array | np.ndarray]
Microbatch = TypeVar("Microbatch")  # what `gradient` takes: a `Batch`, mostly
Metrics = dict[str, Any]  # arrays [*runs]


class State(NamedTuple):
  """What training changes: all that a checkpoint holds of the arrays.

  There are also states of shapes, which say where arrays lie, and of shardings.
  """

  step: Any  # int32 [*runs]
  params: Tree
  opt_state: optax.OptState


class Frozen(NamedTuple):
  """What training reads: the base's frozen leaves and the projections."""

  params: Tree
  projections: Tree


class Sums(NamedTuple):
  """Loss and gradients, summed over so many examples, or tokens."""

  loss: Float[Array, "*shards"]
  examples: Float[Array, "*shards"]
  grads: Tree


def train_step(
  state: State,
  frozen: Frozen,
  microbatches: Sequence[Microbatch],
  key: PRNGKeyArray,
  rates: Mapping[str, Float[Array, ""]],
  *,
  gradient: Callable[[Tree, Frozen, Microbatch, PRNGKeyArray], Sums],
  optimiser: Callable[..., optax.GradientTransformation],
  reduce: Callable[[Sums], Sums] = lambda sums: sums,
) -> tuple[State, Metrics]:
  """The gradients of all microbatches, then one update of the trained leaves.

  Args:
    state: the trained leaves and the optimiser's state; donate it.
    frozen: the base and the projections.
    microbatches: whose examples all weigh alike, however they are divided.
    key: the run's, of dropout and of methods that draw random numbers.
    rates: the optimiser's numbers, by name.
    gradient: of a microbatch, as `microbatch_gradient` gives it.
    optimiser: makes optax's transformation of `rates`.
    reduce: adds up what the shards of a batch have kept apart until here.

  Returns:
    The next state, and the batch's mean loss and its gradient's norm.
  """
  sums = [
    gradient(state.params, frozen, batch, microbatch_key(key, state, number))
    for number, batch in enumerate(microbatches)
  ]
  loss, count, grads = reduce(jax.tree.map(lambda *each: sum(each), *sums))
  count = jnp.maximum(count, 1)  # a batch may have nothing to learn
  grads = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), grads)
  transformation = optimiser(**rates)
  moves, opt_state = transformation.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, moves)
  metrics = {"loss": loss / count, "grad_norm": optax.tree.norm(grads)}
  return State(state.step + 1, params, opt_state), metrics


def microbatch_key(
  key: Key[Array, ""], state: State, number: int | Int[Array, ""]
) -> Key[Array, ""]:
  """The key of a step's microbatch: resuming draws the same numbers again."""
  return jax.random.fold_in(jax.random.fold_in(key, state.step), number)


def microbatch_gradient(
  params: Tree,
  frozen: Frozen,
  batch: Batch,
  key: PRNGKeyArray,
  *,
  outputs: Callable[..., tuple[Tree, Array]],
  loss: Callable[[Tree, Batch], tuple[Array, Array]],
) -> Sums:
  """The loss of a microbatch and its gradient, for the trained leaves alone.

  Args:
    params: the trained leaves.
    frozen: all other leaves.
    batch: packed.
    key: of this microbatch.
    outputs: `outputs_of` a model.
    loss: the task's: (outputs, batch) -> (sum, count).
  """

  def summed_loss(params: Tree) -> tuple[Array, Array]:
    predicted, penalty = outputs(params, frozen, batch, key)
    total, count = loss(predicted, batch)
    return total + penalty * count, count  # the penalty once per mean loss

  differentiate = jax.value_and_grad(summed_loss, has_aux=True)
  (total, count), grads = differentiate(params)
  return Sums(total, count, grads)


def outputs_of(
  module: nn.Module,
  inputs: Sequence[str],
  params: Tree,
  frozen: Frozen,
  batch: Batch,
  key: PRNGKeyArray | None = None,
) -> tuple[Tree, Float[Array, ""]]:
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
  arrays: dict[str, Any] = {name: batch[name] for name in inputs}
  outputs, sown = module.apply(
    variables,
    **arrays,
    deterministic=key is None,
    rngs=rngs,
    mutable=[PENALTIES],
  )
  penalties = [jnp.sum(leaf) for leaf in jax.tree.leaves(sown)]
  return outputs, sum(penalties, start=jnp.float32(0))
