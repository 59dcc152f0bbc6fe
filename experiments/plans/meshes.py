"""Which mesh a step is planned for, by an estimate of each.

Over all divisions of the chips between `data`, `fsdp` and `tensor`, and of a
shard's rows into microbatches, the one whose step is bounded by the fewest
seconds, of those that fit; nothing is compiled. What a real run would refuse is
refused here too.

Memory is exact for what a chip stores between steps. What it holds within one
is an estimate: what the layers keep for the backward pass, and beside it the
largest of one layer's weights and values or the head's. The seconds are those
of the resource that takes longest: products, weights from memory, or bytes from
other chips.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from experiments.plans.chips import Pod
from experiments.plans.lowering import Rows, numbers_on_a_chip
from vera_jax.errors import UserError
from vera_jax.operations.cross_entropy import LOGITS
from vera_jax.pretrained.blueprint import Blueprint, Model, abstract_model
from vera_jax.pretrained.sharding import batch_shards, make_mesh

ROOM = 0.9  # of a chip's memory, at most, by the estimate


class Candidate(NamedTuple):
  """A mesh, and what a step on it is estimated to need.

  Attributes:
    fsdp, tensor: sizes of the mesh's axes; `data` is what is left.
    microbatches: of a step.
    rows: of the step's batch, of all chips.
    bytes: on a chip at once; 0 where it is refused.
    seconds: a step's, at least; likewise.
    refused: why a run would refuse the mesh; "" where it wouldn't.
  """

  fsdp: int
  tensor: int
  microbatches: int
  rows: int
  bytes: float = 0.0
  seconds: float = 0.0
  refused: str = ""


def candidates(
  plan: Blueprint,
  pod: Pod,
  asked: Rows,
  state_bytes: Callable[[Model, Mesh], float],
) -> list[Candidate]:
  """All meshes for these chips, those that fit first, the fastest in front.

  Args:
    plan: of the model.
    pod: the chips.
    asked: the rows of a step; there are more where chips would have none.
    state_bytes: (the model's shapes on a mesh, the mesh) -> bytes that a chip
      stores between steps.
  """
  tried: list[Candidate] = []
  chips = len(pod.devices)
  for tensor, fsdp in _divisions(chips):
    shards = chips // tensor
    each = -(-asked.rows // shards)
    one = Candidate(fsdp, tensor, 1, each * shards)
    try:
      mesh = make_mesh(-1, fsdp, tensor, 1, over=pod.devices)
      model = abstract_model(plan, mesh=mesh)
    except UserError as error:
      tried.append(one._replace(refused=str(error)))
      continue
    stored = state_bytes(model, mesh)
    for microbatches in (n for n in range(1, each + 1) if each % n == 0):
      rows = asked._replace(rows=one.rows // microbatches)
      tried.append(
        one._replace(
          microbatches=microbatches,
          bytes=stored + working_bytes(model, mesh, rows),
          seconds=microbatches * _seconds(model, mesh, rows, pod),
        )
      )
  room = ROOM * pod.memory

  def order(one: Candidate) -> tuple[float, ...]:
    fits = one.bytes <= room
    cost = float(f"{one.seconds:.3g}") if fits else one.bytes
    sizes = one.tensor, one.microbatches, one.bytes
    return bool(one.refused), not fits, cost, *sizes

  return sorted(tried, key=order)


def _divisions(chips: int) -> Iterator[tuple[int, int]]:
  divisors = [n for n in range(1, chips + 1) if chips % n == 0]
  for tensor in divisors:
    yield from ((tensor, n) for n in divisors if chips % (tensor * n) == 0)


class _Sizes(NamedTuple):
  """Numbers of a model by which a step is estimated.

  Attributes:
    layer: frozen or trained numbers of one layer, of the base.
    rest: those outside of the layers.
    width: of the hidden states.
    inner: outputs of the widest layer.
    layers: how many there are.
    heads: of attention.
    forwards: how often a step runs the forward pass.
    number: bytes of a number that is computed with.
  """

  layer: float
  rest: float
  width: int
  inner: int
  layers: int
  heads: int
  forwards: int
  number: int


def _sizes(plan: Blueprint) -> _Sizes:
  config = plan.config
  of_layers = sum(
    leaf.size for path, leaf in plan.shapes.items() if path[0] == "encoder"
  )
  everything = sum(leaf.size for leaf in plan.shapes.values())
  wide = [
    leaf.shape[-1] for path, leaf in plan.shapes.items() if path[-1] == "kernel"
  ]
  return _Sizes(
    of_layers / config.num_hidden_layers,
    everything - of_layers,
    config.hidden_size,
    max(wide, default=config.hidden_size),
    config.num_hidden_layers,
    config.num_attention_heads,
    plan.module.forwards,
    jax.numpy.dtype(plan.dtype).itemsize,
  )


def working_bytes(model: Model, mesh: Mesh, rows: Rows) -> float:
  """What a step's microbatch needs beside what is stored."""
  sizes, tensor = _sizes(model.blueprint), mesh.shape["tensor"]
  each = rows.rows // batch_shards(mesh)
  tokens = each * rows.length
  kept = sizes.layers * tokens * sizes.width * sizes.number
  if rows.length % tensor == 0:
    kept /= tensor
  values = tokens * (12 * sizes.width + 8 * sizes.inner / tensor) * sizes.number
  scores = 3 * 4 * each * sizes.heads / tensor * rows.length
  scores *= min(rows.length, 512)
  if sizes.forwards == 1:
    kept += (sizes.layers - 1) * (values + scores)
  gathered = sizes.number / tensor if mesh.shape["fsdp"] > 1 else 0
  # a layer's weights, and the next one's while it is computed
  layer = 2 * sizes.layer * gathered + values + scores
  # a block's words, and what is summed up over all blocks
  words = min(LOGITS / tokens, sizes.rest / 2 / sizes.width / tensor)
  head = words * sizes.width * sizes.number + 3 * 4 * LOGITS
  head += 3 * 4 * tokens * sizes.width
  gradients = numbers_on_a_chip(model.trainable) * 4
  return kept + max(layer, head) + gradients


def _seconds(model: Model, mesh: Mesh, rows: Rows, pod: Pod) -> float:
  """A microbatch's, at least."""
  sizes, shape = _sizes(model.blueprint), mesh.shape
  fsdp, tensor = shape["fsdp"], shape["tensor"]
  each = rows.rows // batch_shards(mesh)
  tokens = each * rows.length
  passes = sizes.forwards + 1  # and back to the inputs
  attended = 2 * rows.length * sizes.width
  products = passes * tokens * sizes.layers * (sizes.layer + attended)
  products += 2 * each * rows.learned * sizes.rest / 2
  gathers = min(2, passes)  # in the forward pass, and in the backward pass
  weights = gathers * sizes.layers * sizes.layer + sizes.rest / 2
  weights *= sizes.number / tensor
  received = weights * (fsdp - 1) / fsdp
  if tensor > 1:  # behind a layer's two halves, on the way there and back
    sums = 2 * passes * sizes.layers * tokens * sizes.width * sizes.number
    received += sums * 2 * (tensor - 1) / tensor
  received += 2 * 4 * numbers_on_a_chip(model.trainable)
  return max(
    2 * products / tensor / pod.flops,
    weights / pod.bandwidth,
    received / pod.links,
  )
