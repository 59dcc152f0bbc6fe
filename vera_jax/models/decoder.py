"""What decoders have in common: causal attention, the cache, the words' head.

Several examples may share one row: segment ids number them from 1 (0 is
padding), a token attends to itself and to what comes before it in its own
segment, and positions restart in each. While a text is generated, the keys and
values of its tokens so far are in a `Cache`, each row with a length of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from vera_jax.models.part import Part, apply_layers, with_remat
from vera_jax.operations import bands
from vera_jax.operations.attention import Ids
from vera_jax.operations.coded_table import times_words
from vera_jax.operations.quantised import Quantised, is_quantised

HEAD = "language_modelling"
INPUTS = ("input_ids", "positions", "segment_ids", "read_positions")
MULTIPLE = 32  # of slots in a grown cache: products of these are quicker
Hidden = Float[Array, "rows length width"]
Heads = Float[Array, "rows length heads k"]
Reads = Int[Array, "rows reads"]
Mask = Bool[Array, "rows length keys"] | bands.Blocks
Table = Float[Array, "vocab width"] | Quantised


class Cache(NamedTuple):
  """The keys and values of each row's tokens so far; slot p is position p.

  Every layer has arrays of its own, with the axes in the order of the products:
  so a loop over tokens writes to them in place and copies nothing.

  Attributes:
    keys, values: of each layer; keys with their positions' rotations.
    positions: how many tokens each row has.
  """

  keys: tuple[Float[Array, "rows kv_heads k slots"], ...]
  values: tuple[Float[Array, "rows kv_heads slots k"], ...]
  positions: Int[Array, " rows"]

  @property
  def slots(self) -> int:
    return self.values[0].shape[2]


class Words(NamedTuple):
  """The outputs of the head "language_modelling", before they are multiplied.

  The logits of a whole batch would be its largest array by far, so nobody
  forms them at once: see `logits`.

  Attributes:
    hidden: the last hidden states at the read positions, normalised.
    kernel: the output embedding, of one in codes its table.
  """

  hidden: Float[Array, "rows reads width"]
  kernel: Float[Array, "width vocab"] | Quantised


class Reach(NamedTuple):
  """Where the tokens of a call are, and what they attend to.

  Attributes:
    positions: of each token in its text.
    real: whether a token is no padding.
    whole: which keys a token attends to: the cache's slots, if there is one,
      or else the tokens of the call.
    window: those of them that are nearer than the sliding window, if the
      network has one.
    slots: of the cache, which the tokens are written to.
  """

  positions: Ids
  real: Bool[Array, "rows length"]
  whole: Mask
  window: Mask | None
  slots: Ids | None = None


Pair = tuple[Array, Array]  # keys and values


def logits(words: Words) -> Float32[Array, "rows reads vocab"]:
  """The scores of every word at every read position."""
  if isinstance(words.kernel, Quantised):
    return times_words(words.hidden, words.kernel)
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
  heads, width = config.num_key_value_heads, config.head_dim
  keys, values = (
    (jnp.zeros((rows, heads, *shape), dtype),) * config.num_hidden_layers
    for shape in ((width, length), (length, width))
  )
  return Cache(keys, values, jnp.zeros(rows, jnp.int32))


def grow(cache: Cache, slots: int) -> Cache:
  """The cache with as many more slots, and some up to a MULTIPLE."""
  total = -(-(cache.slots + slots) // MULTIPLE) * MULTIPLE
  same, wider = (0, 0), (0, total - cache.slots)
  return cache._replace(
    keys=tuple(jnp.pad(x, (same, same, same, wider)) for x in cache.keys),
    values=tuple(jnp.pad(x, (same, same, wider, same)) for x in cache.values),
  )


def input_shapes(rows: int, length: int, slots: int) -> dict[str, Any]:
  """A packed batch's arrays that decoders take; `slots` are read positions."""
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  reads = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
  return {n: reads if n == "read_positions" else tokens for n in INPUTS}


def find_reach(
  input_ids: Ids,
  positions: Ids | None,
  segment_ids: Ids | None,
  cache: Cache | None,
  *,
  window: int | None = None,
  longest: int | None = None,
) -> Reach:
  """Positions and masks of packed rows, or of tokens that follow a cache's.

  Args:
    input_ids: only their shape counts.
    positions: None where each row is one text from its start. With a cache
      they follow the row's filled slots, and are not looked at.
    segment_ids: None where no token is padding.
    cache: what the row had before; padding may then be anywhere in it.
    window: how many tokens a token sees at most, itself included.
    longest: tokens of the longest text; None: it may fill a row.
  """
  if segment_ids is None:
    segment_ids = jnp.ones_like(input_ids)
  real = segment_ids > 0
  if cache is None:
    if positions is None:
      columns = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
      positions = jnp.broadcast_to(columns, input_ids.shape)
    seen = bands.masks(segment_ids, positions, longest=longest, window=window)
    return Reach(positions, real, *seen)
  before = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
  positions = cache.positions[:, None] + before
  keys_at = jnp.arange(cache.slots, dtype=jnp.int32)[None]
  visible = keys_at[:, None] <= positions[:, :, None]
  near = None
  if window is not None:
    near = visible & (positions[:, :, None] - keys_at[:, None] < window)
  # what is padding, or has no slot left, is written nowhere
  slots = jnp.where(real, positions, cache.slots)
  return Reach(positions, real, visible, near, slots)


def attend_cached(
  query: Heads,
  key: Float[Array, "rows length kv_heads k"],
  value: Float[Array, "rows length kv_heads k"],
  mask: Mask,
  *,
  past: Pair | None,
  scale: float | Array,
  dropout: Callable[[Array], Array],
) -> Hidden:
  """softmax(scale q k) v, each head of k and v for a group of q's heads.

  Scores and softmax are in float32; `dropout` is put on the weights.

  Args:
    query, key, value: of the call's tokens.
    mask: over the call's tokens, or with a cache over its slots.
    past: the cache's keys and values, which have those of the call's tokens by
      now.
    scale: of the scores.
    dropout: on the weights.
  """
  if past is None:
    return bands.attend(query, key, value, mask, scale=scale, dropout=dropout)
  # Every axis but the last two is one of many small products, whose layout is
  # the cache's; the queries are few, and are brought into this order.
  keys, values = past
  rows, groups, slots, width = values.shape
  length = query.shape[1]
  query = query.reshape(rows, length, groups, -1, width)
  query = query.transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, width)
  scores = jnp.einsum(
    "rgnk,rgks->rgns", query, keys, preferred_element_type=jnp.float32
  ).reshape(rows, groups, -1, length, slots)
  lowest = jnp.finfo(scores.dtype).min
  scores = jnp.where(mask[:, None, None], scale * scores, lowest)
  weights = dropout(jax.nn.softmax(scores).astype(values.dtype))
  weights = weights.reshape(rows, groups, -1, slots)
  context = jnp.einsum("rgns,rgsk->rgnk", weights, values)
  context = context.reshape(rows, groups, -1, length, width)
  return context.transpose(0, 3, 1, 2, 4).reshape(rows, length, -1)


def write(
  past: Pair,
  key: Float[Array, "rows length kv_heads k"],
  value: Float[Array, "rows length kv_heads k"],
  reach: Reach,
) -> Pair:
  """A layer's part of the cache with the call's tokens in their slots."""
  rows = jnp.arange(len(key))[:, None]
  keys, values = past
  return (
    keys.at[rows, :, :, reach.slots].set(key.astype(keys.dtype), mode="drop"),
    values.at[rows, :, reach.slots].set(
      value.astype(values.dtype), mode="drop"
    ),
  )


class Pieces(NamedTuple):
  """What a family brings to a `Decoder`.

  Attributes:
    embeddings: a `Part`: (input_ids, positions) -> the hidden states, and the
      table of words [vocab, width].
    layer: a `Part`: (hidden states, its number, its keys and values in the
      cache or None, what all layers share) -> the hidden states, and the keys
      and values in the cache with those of the call's tokens.
    norm: (part, name) -> the module that normalises hidden states there.
    shared: (config, reach) -> what all layers share.
  """

  embeddings: type[Part]
  layer: type[Part]
  norm: Callable[[Part, str], nn.Module]
  shared: Callable[[Any, Reach], Any]


def table_of(words: nn.Embed, dtype: DTypeLike) -> Table:
  """The table of words that a tied network ends with; codes stay codes."""
  stored: Any = words.get_variable("params", "embedding")
  return stored if is_quantised(stored) else jnp.asarray(words.embedding, dtype)


def _layer(
  layer: nn.Module,
  hidden: Hidden,
  number_and_past: tuple[Any, Pair | None],
  shared: Any,
) -> tuple[Hidden, Pair | None]:
  """A layer with its number and its past, as `apply_layers` calls it."""
  return layer(hidden, *number_and_past, shared)


class Stack(Part):
  """All layers, looped or scanned, and the last norm at the read positions.

  The hidden states that go in may have each of the `rows` in parts, one below
  another.
  """

  pieces: Pieces
  scan: bool
  remat: str

  @nn.compact
  def __call__(
    self,
    hidden: Float[Array, "parts part width"],
    reads: Reads | None,
    cache: Cache | None,
    shared: Any,
    *,
    rows: int,
  ) -> tuple[Hidden, Any]:
    layer = with_remat(self.pieces.layer, self.remat, scan=self.scan)
    count = self.config.num_hidden_layers
    past = [None] * count if cache is None else zip(*cache[:2], strict=True)
    each = list(enumerate(past))
    hidden, new = apply_layers(self, layer, _layer, hidden, each, shared)
    hidden = hidden.reshape(rows, -1, hidden.shape[-1])
    if reads is not None:
      hidden = jnp.take_along_axis(hidden, reads[..., None], axis=1)
    return self.pieces.norm(self, "norm")(hidden), new


class Decoder(nn.Module):
  """A decoder with its head for words.

  Attributes:
    config: of the network.
    pieces: of its family.
    dtype: of computing.
    param_dtype: of the parameters.
    scan, remat: as for `pretrained.blueprint`.
    longest: tokens of the longest text in the rows; None: it may fill a row.
  """

  config: Any
  pieces: Pieces
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  scan: bool = True
  remat: str = "none"
  longest: int | None = None

  @nn.compact
  def __call__(
    self,
    input_ids: Ids,
    positions: Ids | None = None,
    segment_ids: Ids | None = None,
    read_positions: Reads | None = None,
    cache: Cache | None = None,
    reach: Reach | None = None,
    *,
    deterministic: bool = True,
  ) -> Words | tuple[Words, Cache]:
    """The last hidden states; with a cache also the cache, filled further.

    Args:
      input_ids: packed rows, or with a cache the tokens that follow it.
      positions: of each token in its text; None for one text in each row. With
        a cache they follow the row's filled slots, and this is not looked at.
      segment_ids: 0 for padding, which no text sees; None where there is none.
      read_positions: columns whose hidden states are wanted; None for all.
      cache: of the tokens before; it needs slots for these.
      reach: where the tokens are and what they attend to, in place of all that;
        None where each row goes on with one text.
      deterministic: whether dropout is off.
    """
    config, pieces = self.config, self.pieces
    settings = (config, self.dtype, self.param_dtype, deterministic)
    reach = reach or find_reach(
      input_ids,
      positions,
      segment_ids,
      cache,
      window=config.sliding_window,
      longest=self.longest,
    )
    if cache is None:
      # Blocks as rows: XLA shares out rows among the cores.
      block = reach.whole.shape[2]
      input_ids = input_ids.reshape(-1, block)
      reach = reach._replace(positions=reach.positions.reshape(-1, block))
    embeddings = pieces.embeddings(*settings, name="embeddings")
    hidden, table = embeddings(input_ids, reach.positions)
    stack = Stack(*settings, pieces, self.scan, self.remat, name="encoder")
    shared = pieces.shared(config, reach)
    rows = len(reach.whole)
    hidden, new = stack(hidden, read_positions, cache, shared, rows=rows)
    if not config.tie_word_embeddings:
      table = Head(*settings, name="lm_head")()
    words = Words(hidden, table if is_quantised(table) else table.T)
    if cache is None:
      return words
    keys, values = zip(*new, strict=True)
    behind = jnp.where(reach.real, reach.positions + 1, 0)
    longest = jnp.maximum(cache.positions, behind.max(axis=1))
    return words, Cache(keys, values, longest)


class Head(Part):
  """The table of words that an untied network ends with.

  It is an embedding's leaf, since the files have it as they have that.
  """

  @nn.compact
  def __call__(self) -> Table:
    stored: Any = self.get_variable("params", "embedding")
    if is_quantised(stored):
      return stored
    config = self.config
    start = nn.initializers.normal(config.initializer_range)
    shape = (config.vocab_size, config.hidden_size)
    table = self.param("embedding", start, shape, self.param_dtype)
    return jnp.asarray(table, self.dtype)


def module(
  pieces: Pieces, config: Any, head: str, outputs: int, **options: Any
) -> Decoder:
  """`Family.module`, with a family's pieces; `outputs` are the vocabulary's."""
  return Decoder(config, pieces, **options)
