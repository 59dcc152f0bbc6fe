"""The shards of a batch: each has a gradient of its own until a step's end.

The rows are split over the mesh's `data` and `fsdp`, and every shard's loss is
differentiated with respect to the trainable leaves as if it were the only one:
loss and gradients have a first axis, one entry per shard, which lies where the
shard's rows lie. So nothing passes between shards within the backward pass, nor
between the microbatches of a step. `total` then adds the shards up: one
all-reduce of as many float32 numbers as are trained, and the loss.

`jax.shard_map` with one `psum` gives the same programs where fsdp is 1. Where
it is not, it needs the kernels gathered by hand inside every layer (XLA aborts
if only `data` is mapped), which is more code than this file.

Leaves that `fsdp` splits have their gradients added over it as they come, for
no device could hold a whole one. Then the shards are those of `data` alone.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, PRNGKeyArray

from vera_jax.errors import UserError
from vera_jax.pretrained.sharding import BATCH
from vera_jax.train.step import Batch, Frozen, Sums, Tree

_TOGETHER = 2**24  # bytes of a leaf that is worth copying into a joint buffer
_LAYERS = (nn.Dense, nn.Embed, nn.LayerNorm)


class Shards(NamedTuple):
  """Over which axes of the mesh gradients are kept apart.

  Attributes:
    mesh: the mesh, or None for a single device outside of any.
    axes: "data", or "data" and "fsdp".
    specs: the PartitionSpec of every trainable leaf, in order.
  """

  mesh: Any
  axes: tuple[str, ...] = ()
  specs: tuple[PartitionSpec, ...] = ()

  @property
  def number(self) -> int:
    return math.prod(self.mesh.shape[a] for a in self.axes) if self.mesh else 1

  def behind(self, sharding: Any, front: int) -> Any:
    """A leaf's sharding once it has the shards' axis, after `front` others."""
    if self.number == 1:
      return sharding
    axes = (*sharding.spec, *(None,) * (front - len(sharding.spec)))
    spec = PartitionSpec(*axes[:front], self.axes, *axes[front:])
    return NamedSharding(sharding.mesh, spec)

  @property
  def rows(self) -> tuple[str, ...]:
    """The axes over which a shard's own rows are split."""
    (axes,) = BATCH
    return tuple(a for a in axes if self.number == 1 or a not in self.axes)


ONE = Shards(None)


def shards_of(shardings: Sequence[Any], *, front: int = 0) -> Shards:
  """The shards of a step that trains leaves with these shardings.

  Args:
    shardings: one per leaf.
    front: first axes of the leaves that are not the leaf's own: an ensemble's.
  """
  if not all(isinstance(sharding, NamedSharding) for sharding in shardings):
    return ONE
  mesh = shardings[0].mesh
  specs = tuple(PartitionSpec(*one.spec[front:]) for one in shardings)
  splits_none = all("fsdp" not in spec for spec in specs)
  return Shards(mesh, ("data", "fsdp") if splits_none else ("data",), specs)


def no_sums(params: Tree, shards: Shards = ONE) -> Sums:
  """What the gradients of a step's microbatches are added to."""
  front = (shards.number,) if shards.number > 1 else ()
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(front + leaf.shape, leaf.dtype), params
  )
  return Sums(jnp.zeros(front), jnp.zeros(front), zeros)


def per_shard(
  gradient: Callable[[Tree, Frozen, Batch, PRNGKeyArray], Sums],
  shards: Shards,
) -> Callable[[Tree, Frozen, Batch, PRNGKeyArray], Sums]:
  """`gradient` of each shard of a microbatch as if it were the only one.

  Where there are several, its sums have a first axis, one entry per shard.
  """

  def of_shards(
    params: Tree, frozen: Frozen, batch: Batch, key: PRNGKeyArray
  ) -> Sums:
    with rows_stay(shards):
      if shards.number == 1:
        return gradient(params, frozen, batch, key)
      # spmd_axis_name puts the shards' axis over the mesh's wherever the model
      # says how an array of its own is split
      each = jax.vmap(
        gradient, in_axes=(None, None, 0, 0), spmd_axis_name=shards.axes
      )
      keys = jax.random.split(key, shards.number)  # dropout masks of their own
      return each(params, frozen, divide(batch, shards), keys)

  return of_shards


def divide(
  batch: Mapping[str, Array | np.ndarray], shards: Shards
) -> dict[str, Array]:
  """Rows [rows, ...] as [shards, rows per shard, ...].

  Raises:
    UserError: the rows don't divide.
  """
  count, mesh = shards.number, shards.mesh
  (rows,) = {len(array) for array in batch.values()}
  if rows % count:
    raise UserError(f"{rows} rows do not divide over {count} batch shards.")
  place = NamedSharding(mesh, PartitionSpec(shards.axes, shards.rows))

  def split(array: Array | np.ndarray) -> Array:
    array = array.reshape(count, rows // count, *array.shape[1:])
    return jax.lax.with_sharding_constraint(array, place)

  return {name: split(array) for name, array in batch.items()}


def rows_stay(shards: Shards) -> Any:
  """A context in which every layer's output is split by its rows.

  XLA may else split it as the layer's kernel is, over `fsdp`, and send
  activations about where it could gather the kernel.
  """
  mesh = shards.mesh
  if mesh is None or mesh.size == mesh.shape["data"]:
    return nullcontext()

  def interceptor(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    if (
      not isinstance(context.module, _LAYERS)
      or context.method_name != "__call__"
    ):
      return y
    spec = PartitionSpec(
      shards.rows, *(PartitionSpec.UNCONSTRAINED,) * (y.ndim - 1)
    )
    return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, spec))

  return nn.intercept_methods(interceptor)


def total(sums: Sums, shards: Shards) -> Sums:
  """The whole batch's loss, count and gradients, from those of its shards.

  One all-reduce: small leaves travel in one buffer with the loss, whatever XLA
  would combine by itself. Large ones are not worth copying into it.
  """
  if shards.number == 1:
    return sums
  leaves, tree = jax.tree.flatten(sums.grads)
  # a leaf that `tensor` splits would have to be gathered to join the others
  joint = [
    not any(spec) and leaf[0].nbytes <= _TOGETHER
    for leaf, spec in zip(leaves, shards.specs, strict=True)
  ]
  small = [sums.loss, sums.examples, *itertools.compress(leaves, joint)]
  flat = jnp.concatenate(
    [leaf.reshape(shards.number, -1) for leaf in small], axis=1
  )
  # the buffer stays split until the sum, which then is the one all-reduce
  apart = NamedSharding(shards.mesh, PartitionSpec(shards.axes))
  flat = jax.lax.with_sharding_constraint(flat, apart)
  flat = _sum(flat, PartitionSpec(), shards)
  ends = np.cumsum([leaf[0].size for leaf in small])[:-1]
  loss, examples, *rest = (
    piece.reshape(leaf.shape[1:])
    for piece, leaf in zip(jnp.split(flat, ends), small, strict=True)
  )
  added = iter(rest)
  leaves = [
    next(added) if joins else _sum(leaf, spec, shards)
    for leaf, spec, joins in zip(leaves, shards.specs, joint, strict=True)
  ]
  return Sums(loss, examples, jax.tree.unflatten(tree, leaves))


def _sum(
  leaf: Float[Array, "shards ..."], spec: PartitionSpec, shards: Shards
) -> Float[Array, "..."]:
  place = NamedSharding(shards.mesh, spec)
  return jax.lax.with_sharding_constraint(leaf.sum(axis=0), place)
