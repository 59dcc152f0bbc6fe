"""The shards of a batch: each has a gradient of its own until a step's end.

The rows are split over the mesh's `data` and `fsdp`. Written as one loss over
all rows, its gradient would be summed over the devices wherever the compiler
puts the sum: inside the backward pass, once per layer and once per microbatch.
So every shard's loss is differentiated with respect to the trainable leaves as
if it were the only one: loss and gradients have a first axis, one entry per
shard, which lies where the shard's rows lie. Nothing passes between shards
within the backward pass, nor between the microbatches of a step. `total` then
adds the shards up: one all-reduce of as many float32 numbers as are trained,
and the loss.

`jax.shard_map` with one `psum` gives the same programs where fsdp is 1. Where
it is not, it needs the kernels gathered by hand inside every layer (XLA aborts
if only `data` is mapped), which is more code than this file.

Leaves that `fsdp` splits have their gradients added over it as they come, for
no device could hold a whole one. Then the shards are those of `data` alone.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import (
  AbstractMesh,
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
)
from jaxtyping import Float, PRNGKeyArray

from vera_jax.errors import UserError
from vera_jax.models.part import is_layer
from vera_jax.operations.split_words import Split, words_are_split
from vera_jax.pretrained.sharding import BATCH
from vera_jax.train.step import Batch, Frozen, Sums, Tree

_TOGETHER = 2**24  # bytes of a leaf that is worth copying into a joint buffer


class Shards(NamedTuple):
  """Over which axes of the mesh gradients are kept apart.

  Attributes:
    mesh: the mesh, or None for a single device outside of any.
    axes: "data", or "data" and "fsdp".
    specs: the PartitionSpec of every trainable leaf, in order.
  """

  mesh: Mesh | AbstractMesh | None
  axes: tuple[str, ...] = ()
  specs: tuple[PartitionSpec, ...] = ()

  @property
  def number(self) -> int:
    return math.prod(self.mesh.shape[a] for a in self.axes) if self.mesh else 1

  def behind(self, sharding: Sharding, front: int) -> Sharding:
    """A leaf's sharding once it has the shards' axis, after `front` others."""
    if self.number == 1 or not isinstance(sharding, NamedSharding):
      return sharding
    # an ensemble's axis of runs stays in front; what XLA leaves off at a
    # spec's end is not split
    axes = (*sharding.spec, *(None,) * (front - len(sharding.spec)))
    spec = PartitionSpec(*axes[:front], self.axes, *axes[front:])
    return NamedSharding(sharding.mesh, spec)

  @property
  def rows(self) -> tuple[str, ...]:
    """The axes over which a shard's own rows are split."""
    (axes,) = BATCH
    return tuple(a for a in axes if self.number == 1 or a not in self.axes)


ONE = Shards(None)


def shards_of(shardings: Sequence[Sharding], *, front: int = 0) -> Shards:
  """The shards of a step that trains leaves with these shardings.

  Args:
    shardings: one per leaf.
    front: first axes of the leaves that are not the leaf's own: an ensemble's.
  """
  named = [one for one in shardings if isinstance(one, NamedSharding)]
  if len(named) < len(shardings):
    return ONE  # a single device
  mesh = named[0].mesh
  specs = tuple(PartitionSpec(*one.spec[front:]) for one in named)
  # A shard's own gradient is as large as all trained leaves. Where fsdp splits
  # one, it is because no device can hold it, so fsdp's part is summed at once.
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
  assert mesh is not None  # for several shards
  (rows,) = {len(array) for array in batch.values()}
  if rows % count:
    raise UserError(f"{rows} rows do not divide over {count} batch shards.")
  # the rows lie so already: consecutive ones on each device, nothing is sent
  sharding = NamedSharding(mesh, PartitionSpec(shards.axes, shards.rows))

  def split(array: Array | np.ndarray) -> Array:
    array = array.reshape(count, rows // count, *array.shape[1:])
    return jax.lax.with_sharding_constraint(array, sharding)

  return {name: split(array) for name, array in batch.items()}


@contextmanager
def rows_stay(shards: Shards) -> Iterator[None]:
  """A context in which every layer's output is split by its rows.

  XLA may else split it as the layer's kernel is, over `fsdp`, and send
  activations about where it could gather the kernel.

  The hidden states that go from one layer of the stack to the next are split
  over `tensor` too, by their columns: they are what the backward pass keeps of
  each layer. Behind a layer's norms they are put together, and so is what comes
  back to its products: left to itself, XLA would gather kernels over `tensor`
  to multiply a few columns each. In an ensemble they stay whole: XLA would send
  them between the runs, whose models are small enough.

  And one in which a decoder's logits are made of blocks of words, of which each
  device gathers one after another.
  """
  mesh = shards.mesh
  if mesh is None or mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
    yield
    return

  tensor = mesh.shape["tensor"] if mesh.shape["runs"] == 1 else 1

  def split(x: Array, *columns: str | None) -> Array:
    # how features are split is tensor parallelism's business
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1 - len(columns))
    spec = PartitionSpec(shards.rows, *columns, *rest)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  @jax.custom_vjp
  def of_dense(y: Array) -> Array:
    return split(y)

  of_dense.defvjp(lambda y: (split(y), None), lambda _, g: (split(g, None),))

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    if tensor > 1 and is_layer(module) and args[0].shape[1] % tensor == 0:
      hidden = split(args[0], "tensor")
      args = tuple(hidden if x is args[0] else x for x in args)
    y = next_fun(*args, **kwargs)
    is_norm = type(module).__name__.endswith("Norm")
    if not is_norm and not isinstance(module, (nn.Dense, nn.Embed)):
      return y
    if tensor == 1 or y.ndim < 3:
      return split(y)
    return split(y, None) if is_norm else of_dense(y)

  parts = math.prod(mesh.shape[axis] for axis in shards.rows)
  with nn.intercept_methods(interceptor), words_are_split(Split(mesh, parts)):
    yield


def total(sums: Sums, shards: Shards) -> Sums:
  """The whole batch's loss, count and gradients, from those of its shards.

  One all-reduce: small leaves travel in one buffer with the loss, whatever XLA
  would combine by itself. Large ones are not worth copying into it.
  """
  if shards.number == 1:
    return sums
  assert shards.mesh is not None
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
  assert shards.mesh is not None
  sharding = NamedSharding(shards.mesh, spec)
  return jax.lax.with_sharding_constraint(leaf.sum(axis=0), sharding)
