"""What decoders have in common: causal attention, the cache, the words' head.

Several examples may share one row: segment ids number them from 1 (0 is
padding), a token attends to itself and to what comes before it in its own
segment, and positions restart in each. While a text is generated, the keys and
values of its tokens so far are in a `Cache`, each row with a length of its own.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

INPUTS = ("input_ids", "positions", "segment_ids", "read_positions")


class Cache(NamedTuple):
  """The keys and values of each row's tokens so far; slot p is position p.

  Attributes:
    keys, values: of every layer; keys with their positions' rotations.
    positions: how many slots of each row are filled.
  """

  keys: Float[Array, "layers rows length kv_heads k"]
  values: Float[Array, "layers rows length kv_heads k"]
  positions: Int[Array, " rows"]


class Words(NamedTuple):
  """The outputs of the head "language_modelling", before they are multiplied.

  The logits of a whole batch would be its largest array by far, so nobody
  forms them at once: see `logits`.

  Attributes:
    hidden: the last hidden states at the read positions, normalised.
    kernel: the output embedding.
  """

  hidden: Float[Array, "rows reads width"]
  kernel: Float[Array, "width vocab"]


def logits(words: Words) -> Float32[Array, "rows reads vocab"]:
  """The scores of every word at every read position."""
  return jnp.matmul(
    words.hidden, words.kernel, preferred_element_type=jnp.float32
  )


def empty_cache(
  config: Any, rows: int, length: int, dtype: DTypeLike = jnp.float32
) -> Cache:
  """A cache with no slot filled.

  Args:
    config: of a decoder.
    rows: of the batch.
    length: the most tokens that a row will have, prompt and answer.
    dtype: that the module computes in.
  """
  layers, heads = config.num_hidden_layers, config.num_key_value_heads
  shape = (layers, rows, length, heads, config.head_dim)
  none = jnp.zeros(shape, dtype)
  return Cache(none, none, jnp.zeros(rows, jnp.int32))
