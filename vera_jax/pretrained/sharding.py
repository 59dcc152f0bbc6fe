"""The device mesh, and where each array lies on it.

Axes: `data` splits the batch, `fsdp` splits the batch and the base's weights,
`tensor` splits heads and feed-forward width. d, b, the projections and the head
lie on every device: they are small, and split they would have to be gathered
for every product.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vera_jax.data.packing import ProcessShard
from vera_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  *,
  over: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh over all devices; one size may be -1: what is left over.

  `over` are other devices than this machine's, such as a described pod's.
  """
  sizes = [data, fsdp, tensor]
  devices = jax.device_count() if over is None else len(over)
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  if min(sizes) < 1 or math.prod(sizes) != devices:
    raise UserError(
      f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit the"
      f" {devices} devices there are; their product must be {devices} (one of"
      " them may be -1 for what is left over)."
    )
  types = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=over)


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_heads(heads: int, mesh: Mesh) -> None:
  """Refuse a `tensor` that would cut through an attention head."""
  tensor = mesh.shape["tensor"]
  if heads == 1 < tensor:
    raise UserError(
      f"config.mesh.tensor={tensor} splits attention heads, and this model has"
      " none, or one: set it to 1."
    )
  if heads % tensor:
    raise UserError(
      f"The model's {heads} attention heads do not divide over the mesh's"
      f" tensor={tensor}; choose a divisor of {heads}."
    )


def _spec(
  path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> PartitionSpec:
  name = "/".join(path)
  for pattern, axes in rules:
    if re.fullmatch(pattern, name):
      split = (None,) * (len(shape) - len(axes)) + axes
      # one scale for all inputs is on every device
      spec = [a if n > 1 else None for n, a in zip(shape, split, strict=True)]
      for size, axis in zip(shape, spec, strict=True):
        if axis and size % mesh.shape[axis]:
          raise UserError(
            f"{name} of shape {shape} does not divide over the mesh's"
            f" {axis}={mesh.shape[axis]}; choose a divisor of {size}."
          )
      return PartitionSpec(*spec)
  return REPLICATED


def param_shardings(
  params: Mapping[str, Any], mesh: Mesh, rules: Rules
) -> dict[str, Any]:
  """A NamedSharding for each leaf of a parameter tree (or of its shapes).

  `rules` are a family's: (pattern over a leaf's path, the axes of the mesh that
  its last axes are split over); the first match wins. The codes, scales and
  minima of a quantised kernel are split as the kernel would be.
  """

  def place(path: tuple[str, ...], leaf: Any) -> Any:
    return jax.tree.map(
      lambda part: NamedSharding(
        mesh, _spec(path, tuple(part.shape), mesh, rules)
      ),
      leaf,
    )

  return unflatten_dict(
    {p: place(p, leaf) for p, leaf in flatten_dict(dict(params)).items()}
  )


def put(tree: Any, shardings: Any) -> Any:
  """Global arrays from host values that every process has in full."""

  def place(value: Any, sharding: NamedSharding) -> jax.Array:
    value = np.asarray(value)
    return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
    )

  if isinstance(shardings, NamedSharding):
    return jax.tree.map(lambda value: place(value, shardings), tree)
  return jax.tree.map(place, tree, shardings)


def process_shard(sharding: NamedSharding) -> ProcessShard:
  """The batch rows that this process must supply for its devices."""
  here = sharding.addressable_devices_indices_map((sharding.num_devices,))
  of = sharding.num_devices
  rows = [index[0].indices(of) for index in here.values() if index]
  return ProcessShard(min(r[0] for r in rows), max(r[1] for r in rows), of)


def behind_runs(sharding: NamedSharding) -> NamedSharding:
  """The same placing behind a leading axis, which no device splits: the runs of
  an ensemble."""
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def put_rows(tree: Any, sharding: NamedSharding, shard: ProcessShard) -> Any:
  """Global arrays from the rows that each process supplies.

  The rows are the axis that `sharding` splits: the first, or the one behind the
  runs of an ensemble.
  """
  axis = len(sharding.spec) - 1

  def place(value: Any) -> jax.Array:
    shape = list(value.shape)
    shape[axis] = shard.global_rows(shape[axis])
    low, _ = shard.bounds(shape[axis])

    def own(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # asked of this process's devices alone
      first, last, _ = index[axis].indices(shape[axis])
      here = slice(first - low, last - low)
      return value[(*index[:axis], here, *index[axis + 1 :])]

    return jax.make_array_from_callback(tuple(shape), sharding, own)

  return jax.tree.map(place, tree)
