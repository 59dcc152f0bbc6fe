"""A function of one run, for all runs of an ensemble at once.

Every part of the mesh's `runs` computes its own runs on the devices that it
has. Where that is one device, `jax.shard_map` keeps the parts apart: nothing
can pass between them, whatever a method computes. Where it is several, the axis
of runs is batched and lies over the mesh's; there XLA aborts if it is mapped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from vera_jax.pretrained.sharding import RUNS


def each_run(
  function: Callable[..., Any],
  mesh: Mesh | AbstractMesh | None,
  *,
  in_axes: Sequence[int | None],
) -> Callable[..., Any]:
  """`function` of arguments, and with results, that have a leading axis.

  The runs of one part are batched.

  Args:
    function: of one run.
    mesh: whose `runs` split the leading axis; None for a single device.
    in_axes: 0 for an argument that has the axis, None for one that all share.
  """
  batched = jax.vmap(function, in_axes=in_axes)
  if mesh is None or mesh.shape[RUNS] == 1:
    return batched
  if mesh.size > mesh.shape[RUNS]:
    # spmd_axis_name: also where it is said how an array of one run is split
    return jax.vmap(function, in_axes=in_axes, spmd_axis_name=RUNS)

  def of_part(*arguments: Any) -> Any:
    shared = [axis is None for axis in in_axes]
    (runs,) = {
      len(leaf)
      for argument, is_shared in zip(arguments, shared, strict=True)
      if not is_shared
      for leaf in jax.tree.leaves(argument)
    }
    if runs > 1:
      return batched(*arguments)
    # without the axis: what a run alone computes, as it computes it
    alone = (
      argument if is_shared else jax.tree.map(lambda leaf: leaf[0], argument)
      for argument, is_shared in zip(arguments, shared, strict=True)
    )
    return jax.tree.map(lambda leaf: leaf[None], function(*alone))

  split = PartitionSpec(RUNS)
  return jax.shard_map(
    of_part,
    mesh=mesh,
    in_specs=tuple(split if axis == 0 else PartitionSpec() for axis in in_axes),
    out_specs=split,
    check_vma=False,
  )
