"""Cross-entropy over a large vocabulary, with few logits in memory at a time.

A batch's logits would be its largest array by far: 2,048 positions have 412 MB
of them at a vocabulary of 50,257. They are computed for a block of positions
after another instead, and each block gives its losses and their gradient for
the hidden states before the next one begins. Those gradients are as small as
the hidden states, and making them in the forward pass saves the backward pass
from computing the logits again.

A loop's arguments are copied where they are transposed, so the loops take the
embedding as [vocab, width]: tied ones are stored like that. One in codes is
dequantised in blocks of words (`coded_table.py`), once for the logits and once
for the gradient.

Where a mesh splits the embedding, blocks of words take the place of blocks of
positions (`split_words.py`).

With z the logits of a position, y its label, V the vocabulary's size and e the
smoothing, its loss and that one's gradient for the logits are

  log sum(exp z) - (1 - e) z_y - e mean(z)      softmax(z) - (1 - e) [y] - e / V
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Bool, Float, Float32, Int

from vera_jax.operations.coded_table import from_words, times_words
from vera_jax.operations.quantised import Quantised, is_quantised
from vera_jax.operations.split_words import cross_entropy_of, split_of_words

LOGITS = 2**24  # at most so many in a block: 64 MiB in float32


def cross_entropy(
  hidden: Float[Array, "rows reads width"],
  kernel: Float[Array, "width vocab"] | Quantised,
  labels: Int[Array, "rows reads"],
  *,
  smoothing: float = 0.0,
  block: int = LOGITS,
) -> Float32[Array, "rows reads"]:
  """The loss of each position in nats: -log p(label), smoothed.

  Args:
    hidden: the last hidden states at the positions that are learned.
    kernel: the output embedding, or its table in codes.
    labels: the word that follows each position.
    smoothing: e; (1 - e) of the loss is that of the label, and e the mean of
      -log p over the whole vocabulary, the label included, as in
      microsoft/LoRA's examples/NLG.
    block: the most logits that are computed together, for every row at least
      those of one position.
  """
  split = split_of_words()
  if split is not None and not isinstance(kernel, Quantised):
    return cross_entropy_of(hidden, kernel.T, labels, smoothing, split, block)
  return _losses(hidden, kernel, labels, smoothing, block)


def score_words(
  hidden: Float[Array, "rows reads width"],
  kernel: Float[Array, "width vocab"] | Quantised,
  labels: Int[Array, "rows reads"],
  *,
  block: int = LOGITS,
) -> tuple[Float32[Array, "rows reads"], Bool[Array, "rows reads"]]:
  """-log p of each label in nats, and whether it is the likeliest word."""
  embedding = _embedding(kernel)

  def score(read: Any, label: Any) -> Any:
    logits = _logits(read, embedding)
    loss, _ = _smoothed(logits, label, 0.0)
    return loss, logits.argmax(-1) == label

  positions = block // embedding.shape[0]
  return _by_blocks(score, hidden, labels, positions=positions)


def _by_blocks(
  function: Callable[..., Any], hidden: Any, labels: Any, *, positions: int
) -> Any:
  """function(hidden, labels) on one block of columns after another."""
  rows, reads = labels.shape
  blocks = _blocks(hidden, labels, positions=positions)
  parts = jax.lax.map(lambda block: function(*block), blocks)

  def joined(array: Any) -> Any:
    array = jnp.moveaxis(array, 0, 1)
    return array.reshape(rows, -1, *array.shape[3:])[:, :reads]

  return jax.tree.map(joined, parts)


def _blocks(*arrays: Any, positions: int) -> tuple[Any, ...]:
  """Arrays [rows, reads, ...] as [blocks, rows, columns, ...], with zeros at
  the end. Columns are parted, since the rows may be split over devices.

  `positions` are the most in a block.
  """
  rows, reads = arrays[0].shape[:2]
  columns = min(max(1, positions // rows), max(1, reads))
  number = -(-reads // columns)
  columns = -(-reads // max(1, number))  # of equal size: the fewest zeros

  def split(array: Any) -> Any:
    rest = ((0, 0),) * (array.ndim - 2)
    array = jnp.pad(array, ((0, 0), (0, number * columns - reads), *rest))
    array = array.reshape(rows, number, columns, *array.shape[2:])
    return jnp.moveaxis(array, 1, 0)

  return tuple(map(split, arrays))


def _embedding(kernel: Any) -> Any:
  """The words' rows [vocab, width], which a table in codes has already."""
  return kernel if is_quantised(kernel) else kernel.T


def _logits(read: Any, embedding: Any) -> Any:
  if is_quantised(embedding):
    return times_words(read, embedding)
  return jnp.einsum(
    "rcd,vd->rcv", read, embedding, preferred_element_type=jnp.float32
  )


def _smoothed(logits: Any, labels: Any, smoothing: float) -> tuple[Any, Any]:
  """(losses, log sum(exp)) of a block."""
  total = jax.nn.logsumexp(logits, axis=-1)
  own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  losses = total - (1 - smoothing) * own
  if smoothing:
    losses = losses - smoothing * jnp.mean(logits, axis=-1)
  return losses, total


def _loss_and_slope(
  read: Any, labels: Any, embedding: Any, smoothing: float
) -> tuple[Any, Any]:
  """A block's losses and their gradients for the logits."""
  logits = _logits(read, embedding)
  losses, total = _smoothed(logits, labels, smoothing)
  words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
  is_label = words == labels[..., None]
  slope = jnp.exp(logits - total[..., None]) - smoothing / logits.shape[-1]
  slope = slope - jnp.where(is_label, 1 - smoothing, 0)
  return losses, slope.astype(embedding.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _losses(hidden, kernel, labels, smoothing, block):
  embedding = _embedding(kernel)

  def losses(read: Any, label: Any) -> Any:
    return _smoothed(_logits(read, embedding), label, smoothing)[0]

  positions = block // embedding.shape[0]
  return _by_blocks(losses, hidden, labels, positions=positions)


def _forward(hidden, kernel, labels, smoothing, block):
  """The losses; for the backward pass each one's gradient for its hidden
  state, and what the kernel's gradient is made of if that is trained."""
  trains_kernel = any(leaf.perturbed for leaf in jax.tree.leaves(kernel))
  hidden, kernel, labels = jax.tree.map(
    lambda leaf: leaf.value, (hidden, kernel, labels)
  )
  embedding = _embedding(kernel)

  def both(read: Any, label: Any) -> Any:
    losses, slope = _loss_and_slope(read, label, embedding, smoothing)
    if is_quantised(embedding):
      to_hidden = from_words(slope, embedding)
    else:
      to_hidden = jnp.einsum(
        "rcv,vd->rcd", slope, embedding, preferred_element_type=jnp.float32
      )
    return losses, to_hidden.astype(hidden.dtype)

  losses, to_hidden = _by_blocks(
    both, hidden, labels, positions=block // embedding.shape[0]
  )
  for_kernel = (hidden, kernel, labels) if trains_kernel else None
  return losses, (to_hidden, for_kernel)


def _backward(smoothing, block, kept, slope):
  to_hidden, for_kernel = kept
  if isinstance(slope, SymbolicZero):
    slope = jnp.zeros(slope.shape, slope.dtype)
  slope = slope[..., None]
  to_hidden = (slope * to_hidden.astype(jnp.float32)).astype(to_hidden.dtype)
  if for_kernel is None:
    return to_hidden, None, None
  # Of a trained kernel the gradient depends on `slope`: the logits again.
  hidden, kernel, labels = for_kernel
  embedding = kernel.T

  def add(sums: Any, own: Any) -> Any:
    read, label, weight = own
    _, slope = _loss_and_slope(read, label, embedding, smoothing)
    part = jnp.einsum(
      "rcd,rcv->vd",
      (read * weight).astype(kernel.dtype),
      slope,
      preferred_element_type=jnp.float32,
    )
    return sums + part, None

  blocks = _blocks(hidden, labels, slope, positions=block // kernel.shape[1])
  zeros = jnp.zeros(embedding.shape, jnp.float32)
  to_embedding, _ = jax.lax.scan(add, zeros, blocks)
  return to_hidden, to_embedding.T.astype(kernel.dtype), None


_losses.defvjp(_forward, _backward, symbolic_zeros=True)
