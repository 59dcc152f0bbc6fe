"""The device mesh, and where each array lies on it.

Axes: `runs` splits the runs of an ensemble, each of which has the other three
for itself. `data` splits the batch, `fsdp` splits the batch and the base's
weights, `tensor` splits heads and feed-forward width, and between layers the
tokens of a row. d, b, the projections and a task's head lie on every device:
they are small, and split they would have to be gathered for every product. So
do LoRA's matrices, but where they are large.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vera_jax.adapters.interface import Path, Target
from vera_jax.adapters.plans import Split
from vera_jax.adapters.sites import layer_path
from vera_jax.data.packing import ProcessShard
from vera_jax.errors import UserError

RUNS = "runs"
AXES = (RUNS, "data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()
LARGE = 2**24  # numbers of a leaf that not every device need have
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


class Together(NamedTuple):
  """Runs that train in one program, and the rows that a step of each has."""

  runs: int
  rows: int


ALONE = Together(runs=1, rows=1)


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  runs: int = -1,
  *,
  over: Sequence[Any] | None = None,
  together: Together = ALONE,
) -> Mesh:
  """A mesh over all devices.

  Args:
    data, fsdp, tensor: of these one may be -1: what is left over.
    runs: into how many parts the runs of an ensemble are split; -1 for
      `split_runs`.
    over: other devices than this machine's, such as a described pod's.
    together: the ensemble, of which `split_runs` takes account.

  Raises:
    UserError: the devices can't be divided so.
  """
  devices = jax.device_count() if over is None else len(over)
  sizes = mesh_sizes(devices, data, fsdp, tensor, runs, together=together)
  types = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(sizes, AXES, axis_types=types, devices=over)


def mesh_sizes(
  devices: int,
  data: int,
  fsdp: int,
  tensor: int,
  runs: int,
  *,
  together: Together,
) -> tuple[int, ...]:
  """The sizes of a mesh's axes, as `AXES` has them; see `make_mesh`."""
  if runs == -1:
    runs = split_runs(together, devices, data, fsdp, tensor)
  sizes = [runs, data, fsdp, tensor]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  if min(sizes) < 1 or math.prod(sizes) != devices:
    split = f"runs={runs}, " if runs != 1 else ""
    raise UserError(
      f"mesh {split}data={data}, fsdp={fsdp}, tensor={tensor} does not fit the"
      f" {devices} devices there are; their product must be {devices} (one of"
      " them may be -1 for what is left over)."
    )
  return tuple(sizes)


def split_runs(
  together: Together, devices: int, data: int, fsdp: int, tensor: int
) -> int:
  """Into how many parts the runs of an ensemble are best split.

  The devices that `fsdp` and `tensor` leave are divided between `runs` and
  `data` such that a device has the fewest rows in a step; those of a part that
  lacks a run, and of a shard that lacks a row, count. Of equal divisions the
  one with most parts is taken, for runs send each other nothing.
  """
  if together.runs == 1 or min(fsdp, tensor) < 1 or devices % (fsdp * tensor):
    return 1
  left = devices // (fsdp * tensor)
  if data != -1:
    return left // data if data > 0 and left % data == 0 else 1

  def rows_a_device(parts: int) -> int:
    shards = left // parts * fsdp
    return -(-together.runs // parts) * -(-together.rows // shards)

  divisors = [n for n in range(1, left + 1) if left % n == 0]
  return min(divisors, key=lambda parts: (rows_a_device(parts), -parts))


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


def leaf_sharding(
  path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> NamedSharding:
  """Where one leaf lies; see `param_shardings`."""
  return NamedSharding(mesh, _spec(path, shape, mesh, rules))


def _spec(
  path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> PartitionSpec:
  name = "/".join(path)
  if path[-1] == "embedding" and len(shape) == 3:  # a table's codes
    return REPLICATED
  for pattern, axes in rules:
    if re.fullmatch(pattern, name):
      split = (None,) * (len(shape) - len(axes)) + axes
      # one scale for all inputs is on every device
      spec = [a if n > 1 else None for n, a in zip(shape, split, strict=True)]
      # a vocabulary has the size that it has, such as 32,001
      if path[-1] == "embedding" and shape[0] % mesh.shape[spec[0] or RUNS]:
        spec[0] = None
      for size, axis in zip(shape, spec, strict=True):
        if axis and size % mesh.shape[axis]:
          raise UserError(
            f"{name} of shape {shape} does not divide over the mesh's"
            f" {axis}={mesh.shape[axis]}; choose a divisor of {size}."
          )
      return PartitionSpec(*spec)
  return _spec_of_others(shape, mesh.shape["fsdp"])


def _spec_of_others(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """That of a leaf without a rule: LoRA's matrices of a large model, with their
  gradients and the optimiser's state, are split over `fsdp`."""
  if len(shape) > 1 and fsdp > 1 and math.prod(shape) >= LARGE:
    longest = max(range(len(shape)), key=lambda axis: shape[axis])
    if shape[longest] % fsdp == 0:
      return PartitionSpec(*(None,) * longest, "fsdp")
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
      lambda part: leaf_sharding(path, tuple(part.shape), mesh, rules), leaf
    )

  return unflatten_dict(
    {p: place(p, leaf) for p, leaf in flatten_dict(dict(params)).items()}
  )


def splits_of(
  sites: Mapping[Path, Target], mesh: Mesh, rules: Rules
) -> dict[Path, Split]:
  """How the mesh divides the products of the sites whose kernels it splits."""
  splits: dict[Path, Split] = {}
  for path, target in sites.items():
    name = "/".join((*layer_path(path, target), "kernel"))
    axes = next((a for pattern, a in rules if re.fullmatch(pattern, name)), ())
    if len(axes) == 2:
      sizes = {axis: mesh.shape[axis] for axis in axes if axis}
      fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
      if fsdp == tensor == 1:
        continue
      inputs, outputs = (tensor if a == "tensor" else 1 for a in axes)
      up = PartitionSpec(None, "tensor" if outputs > 1 else None)
      thin = PartitionSpec(PartitionSpec.UNCONSTRAINED, "tensor")
      splits[path] = Split(
        fsdp,
        inputs,
        outputs,
        up=NamedSharding(mesh, up),
        down=NamedSharding(
          mesh, PartitionSpec("tensor" if inputs > 1 else None)
        ),
        thin=NamedSharding(mesh, thin) if tensor > 1 else None,
        tensor=tensor,
      )
  return splits


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
  """The same placing behind a leading axis: the runs of an ensemble."""
  return NamedSharding(sharding.mesh, PartitionSpec(RUNS, *sharding.spec))


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
