"""One leaf of the tree, made of the tensors of a checkpoint that hold it.

It is made whole, or as a sharded array, of which a process reads the slices
that its devices hold: a split of a kernel's outputs is rows of torch's tensors,
which are (out, in), and a split of its inputs columns. Either way some of the
bytes are read at a time, and a kernel is quantised as they come.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from vera_jax.errors import UserError
from vera_jax.models.gguf_folder import Tensors
from vera_jax.models.safetensors_file import (
  FLOATS,
  Index,
  bounds,
  check_type,
)
from vera_jax.operations.gguf_codes import keep
from vera_jax.operations.quantised import (
  INT8,
  KEEP,
  Quantised,
  abstract_kernel,
  quantise,
  stack_layers,
)

ALIGNED = 64  # bytes
# (path, shape) of a leaf, or of a part of one in codes -> where it lies.
Place = Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]
Read = Callable[[Index], np.ndarray]
Block = tuple[slice, np.ndarray]


class Source(NamedTuple):
  """One tensor of a checkpoint: its name there and the open file."""

  name: str
  file: Any

  def blocks(self, index: Index, *, axis: int = 0) -> Iterator[Block]:
    """A slice in blocks along an axis: where each lies in it, and its numbers;
    of a GGUF file the whole tensor."""
    if isinstance(self.file, Tensors):
      yield slice(None), self.file.get_tensor(self.name)
    else:
      yield from self.file.get_slice(self.name).blocks(index, axis=axis)


def _unseen(count: int) -> None:
  """Where no bar is shown."""


class Leaf(NamedTuple):
  """What is to be made, and of what.

  Attributes:
    path, shape, dtype: in the tree.
    sources: one tensor, or one per layer where layers are stacked.
    turned: whether a file has it as (out, in), or (out, in, height, width).
    advance: receives the number of bytes after each read.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: DTypeLike
  sources: Sequence[Source]
  turned: bool
  advance: Callable[[int], None] = _unseen

  @property
  def stacked(self) -> bool:
    return "layer" in self.path

  def layers(self, index: Index) -> Iterator[tuple[Source, Index]]:
    """The tensors that a slice of the leaf is in, and the slice of each."""
    layers, *inside = index if self.stacked else (slice(None), *index)
    if self.turned:
      inside = [inside[axis] for axis in file_axes(len(inside))]
    for source in self.sources[layers]:
      yield source, inside
      shape = source.file.get_slice(source.name).get_shape()
      self.advance(self._bytes(bounds(inside, shape)))

  def share(self, place: Place | None) -> int:
    """The bytes of the tensors that this process reads."""
    slices: Iterable[Any] = [(slice(None),) * len(self.shape)]
    if place is not None:
      sharding = place(self.path, self.shape)
      slices = sharding.addressable_devices_indices_map(self.shape).values()
    different = {tuple(bounds(index, self.shape)) for index in slices}
    return sum(self._bytes(part) for part in different)

  def _bytes(self, part: Iterable[tuple[int, int]]) -> int:
    name, file = self.sources[0]
    numbers = math.prod(high - low for low, high in part)
    return numbers * FLOATS[file.get_slice(name).get_dtype()].itemsize

  def check(self) -> None:
    """Refuse a tensor of another shape, or of numbers that are not read."""
    shape = self.shape[1:] if self.stacked else self.shape
    if self.turned:
      shape = tuple(shape[axis] for axis in file_axes(len(shape)))
    for name, file in self.sources:
      header = file.get_slice(name)
      stored = tuple(header.get_shape())
      if stored != shape:
        raise UserError(
          f"Tensor {name!r} has shape {stored} in the checkpoint, but "
          f"the model of its config.json and task needs {shape}."
        )
      check_type(name, header.get_dtype())


def file_axes(count: int) -> tuple[int, ...]:
  """A kernel's axes in torch's order."""
  return (3, 2, 0, 1) if count == 4 else tuple(reversed(range(count)))


def read_leaf(leaf: Leaf, place: Place | None) -> Any:
  """The leaf's numbers, as an array of numpy or, with `place`, of JAX."""

  def read(index: Index) -> np.ndarray:
    sizes = [high - low for low, high in bounds(index, leaf.shape)]
    made = _lasting(sizes, leaf.dtype)
    slots = made if leaf.stacked else made[None]
    for slot, (source, inside) in zip(slots, leaf.layers(index), strict=True):
      if leaf.turned:
        slot = slot.transpose(file_axes(slot.ndim))
      if isinstance(source.file, Tensors):
        source.file.fill(source.name, slot)
        continue
      for rows, block in source.blocks(inside):
        slot[rows] = block
    return made

  return _placed(read, leaf.path, leaf.shape, place)


def read_codes(leaf: Leaf, kind: str, place: Place | None) -> Quantised | None:
  """The leaf, a kernel, in codes; None where a layer of it can't be.

  Raises:
    UserError: it has values that are not finite numbers.
  """
  if kind == KEEP:
    return _keep_codes(leaf)
  shapes = abstract_kernel(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), kind)
  if not isinstance(shapes, Quantised):
    return None
  *_, inputs, _ = leaf.shape
  blocks = 0 if shapes.scale is None else shapes.scale.shape[-2]
  largest = _largest(leaf, place) if kind == INT8 else {}
  scales: dict[Any, np.ndarray] = {}

  def read(index: Index) -> np.ndarray:
    *stack, rows, outputs = bounds(index, shapes.codes.shape)
    first, last = (row * inputs // shapes.codes.shape[-2] for row in rows)
    cut = slice(None)
    if kind != INT8 and (first * blocks % inputs or last * blocks % inputs):
      # parts of a block, which has one scale: the whole column is read
      cut, first, last = slice(*rows), 0, inputs
    # of int8 the one row of scales, also where the inputs are split
    row = first * blocks // inputs, -(-last * blocks // inputs)
    key = (*stack, row, outputs)
    sizes = [high - low for low, high in (*stack, rows, outputs)]
    codes = _lasting(sizes, shapes.codes.dtype)
    scale = np.empty([high - low for low, high in key], np.float32)
    inside = (*index[:-2], slice(first, last), index[-1])
    for number, source, part, kernel in _kernels(leaf, inside):
      there = largest[key][number][:, part] if key in largest else None
      try:
        made = quantise(kernel, kind, dtype=leaf.dtype, largest=there)
      except UserError as error:
        raise UserError(
          f"Tensor {source.name!r} can't be quantised: {error}"
        ) from error
      assert made is not None  # its blocks are whole
      codes[number][:, part] = made.codes[cut]
      if blocks:
        scale[number][:, part] = made.scale
    scales[key] = scale
    return codes

  def read_scale(index: Index) -> np.ndarray:
    return scales[tuple(bounds(index, shapes.scale.shape))]

  codes = _placed(read, leaf.path, shapes.codes.shape, place)
  scale = None
  if blocks:
    scale = _placed(read_scale, leaf.path, shapes.scale.shape, place)
  return dataclasses.replace(shapes, codes=codes, scale=scale)


def put_parts(path: tuple[str, ...], leaf: Any, place: Place) -> Any:
  """A leaf, or the parts of one in codes, that this process has whole."""
  return jax.tree.map(
    lambda part: _placed(part.__getitem__, path, part.shape, place), leaf
  )


def _keep_codes(leaf: Leaf) -> Quantised | None:
  layers = []
  for source in leaf.sources:
    codes = source.file.get_codes(source.name)
    layer = keep(codes, dtype=leaf.dtype, table=leaf.path[-1] == "embedding")
    if layer is None:
      return None
    layers.append(layer)
  return stack_layers(layers) if leaf.stacked else layers[0]


def _kernels(
  leaf: Leaf, index: Index
) -> Iterator[tuple[Any, Source, slice, np.ndarray]]:
  """A slice of a kernel by layers and blocks of outputs: the layer's index in
  it, the tensor, which outputs, and the numbers [inputs, outputs]."""
  axis = 0 if leaf.turned else 1
  for number, (source, inside) in enumerate(leaf.layers(index)):
    for part, block in source.blocks(inside, axis=axis):
      yield (
        number if leaf.stacked else ...,
        source,
        part,
        block.T if leaf.turned else block,
      )


def _largest(leaf: Leaf, place: Place | None) -> dict[Any, np.ndarray]:
  """Each output's largest weight, for a kernel whose inputs a mesh splits.

  The scales of int8 are for all inputs, of which a process reads some: each
  takes the largest of its own, and the largest of these is found together. What
  it has read is not kept, and is read a second time.

  Returns:
    By the slice of (*stack, 1, outputs), what this process needs of it; {}
    where a process has all inputs.
  """
  if place is None:
    return {}
  *stack, inputs, outputs = leaf.shape
  sharding = place(leaf.path, leaf.shape)
  part_inputs = sharding.shard_shape(leaf.shape)[-2]
  if part_inputs == inputs:
    return {}

  def read(index: Index) -> np.ndarray:
    *_, rows, _ = bounds(index, shape)
    first, last = (row * part_inputs for row in rows)
    largest = np.zeros([b - a for a, b in bounds(index, shape)], np.float32)
    inside = (*index[:-2], slice(first, last), index[-1])
    for number, _, part, kernel in _kernels(leaf, inside):
      largest[number][:, part] = np.abs(kernel.astype(np.float32)).max(axis=0)
    return largest

  leaf = leaf._replace(advance=_unseen)
  shape = (*stack, inputs // part_inputs, outputs)
  parts = _placed(read, leaf.path, shape, lambda *_: sharding)
  spec = [*sharding.spec, None, None][: len(shape)]
  spec[-2] = None
  together = jax.jit(
    lambda x: x.max(-2, keepdims=True),
    out_shardings=NamedSharding(sharding.mesh, PartitionSpec(*spec)),
  )(parts)
  return {
    tuple(bounds(shard.index, together.shape)): np.asarray(shard.data)
    for shard in together.addressable_shards
  }


def _placed(
  read: Read,
  path: tuple[str, ...],
  shape: tuple[int, ...],
  place: Place | None,
) -> Any:
  """What `read` gives: whole, or of each slice that a device here holds."""
  if place is None:
    return read((slice(None),) * len(shape))
  slices: dict[Any, np.ndarray] = {}

  def once(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # asked of this process's devices alone
    key = tuple(bounds(index, shape))
    if key not in slices:  # other devices may hold the same one
      slices[key] = read(index)
    return slices[key]

  placed = jax.make_array_from_callback(shape, place(path, shape), once)
  return placed.block_until_ready()  # so that one leaf waits to be copied


def _lasting(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
  """An empty array whose memory JAX takes for its own on a CPU, uncopied.

  It does so where an array begins at a multiple of 64 bytes, and copies it
  before it writes into it.
  """
  size = math.prod(shape) * jnp.dtype(dtype).itemsize
  data = np.empty(size + ALIGNED, np.uint8)
  first = -data.ctypes.data % ALIGNED
  return data[first : first + size].view(dtype).reshape(shape)
