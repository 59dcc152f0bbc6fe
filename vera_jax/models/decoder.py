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

from vera_jax.errors import UserError
from vera_jax.models import bands, part
from vera_jax.models.attention import REMAT_POLICIES, Ids, check_remat

HEAD = "language_modelling"
INPUTS = ("input_ids", "positions", "segment_ids", "read_positions")
Hidden = Float[Array, "rows length width"]
Heads = Float[Array, "rows length heads k"]
Reads = Int[Array, "rows reads"]
Mask = Bool[Array, "rows length keys"] | bands.Blocks


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


class Reach(NamedTuple):
  """Where the tokens of a call are, and what they attend to.

  Attributes:
    positions: of each token in its text.
    real: whether a token is no padding.
    whole: which keys a token attends to: the cache's slots, if there is one,
      and then the tokens of the call.
    window: those of them that are nearer than the sliding window, if the
      network has one.
  """

  positions: Ids
  real: Bool[Array, "rows length"]
  whole: Mask
  window: Mask | None


Pair = tuple[Array, Array]  # keys and values


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
  return Cache(
    jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32)
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
  length = input_ids.shape[1]
  columns = jnp.arange(length, dtype=jnp.int32)
  causal = (columns[:, None] >= columns[None])[None]
  if segment_ids is None:
    segment_ids = jnp.ones_like(input_ids)
  real = segment_ids > 0
  if cache is None:
    if positions is None:
      positions = jnp.broadcast_to(columns, input_ids.shape)
    seen = bands.masks(segment_ids, positions, longest=longest, window=window)
    return Reach(positions, real, *seen)
  else:
    before = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    positions = cache.positions[:, None] + before
    slots = jnp.arange(cache.keys.shape[2], dtype=jnp.int32)[None]
    slots = jnp.broadcast_to(slots, (len(input_ids), slots.size))
    filled = (slots < cache.positions[:, None])[:, None]
    filled = jnp.broadcast_to(filled, (*input_ids.shape, slots.shape[1]))
    # padding sees itself, so that no softmax is over nothing
    itself = jnp.eye(length, dtype=bool)[None]
    whole = jnp.concatenate([filled, real[:, None] & causal | itself], axis=-1)
    keys_at = jnp.concatenate([slots, positions], axis=-1)
  near = None
  if window is not None:
    near = whole & (positions[:, :, None] - keys_at[:, None] < window)
  return Reach(positions, real, whole, near)


def attend(
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
    mask: over the cache's slots and the call's tokens.
    past: the cache's keys and values, which nothing is copied from.
    scale: of the scores.
    dropout: on the weights.
  """
  if mask.ndim == 4:  # there is no cache
    return bands.attend(query, key, value, mask, scale=scale, dropout=dropout)
  groups = key.shape[2]
  query = query.reshape(*query.shape[:2], groups, -1, query.shape[-1])
  keys, values = [key], [value]
  if past is not None:
    keys, values = [past[0], key], [past[1], value]
  parts = [
    jnp.einsum(
      "rqgmk,rsgk->rgmqs", query, x, preferred_element_type=jnp.float32
    )
    for x in keys
  ]
  scores = scale * jnp.concatenate(parts, axis=-1)
  lowest = jnp.finfo(scores.dtype).min
  scores = jnp.where(mask[:, None, None], scores, lowest)
  weights = dropout(jax.nn.softmax(scores).astype(value.dtype))
  slots = weights.shape[-1] - value.shape[1]
  seen = jnp.split(weights, [slots], axis=-1) if slots else [weights]
  context = sum(
    jnp.einsum("rgmqs,rsgk->rqgmk", w, x)
    for w, x in zip(seen, values, strict=True)
  )
  return jnp.asarray(context).reshape(*mask.shape[:2], -1)


class Part(part.Part):
  """A piece of a decoder."""

  @nn.nowrap
  def embed(self, words: int, name: str) -> nn.Embed:
    return nn.Embed(
      words,
      self.config.hidden_size,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      embedding_init=nn.initializers.normal(self.config.initializer_range),
      name=name,
    )


def fill(cache: Cache, new: Pair, reach: Reach) -> Cache:
  """The cache with a call's keys and values in the slots of their positions.

  What is padding, or has a position past the last slot, is written nowhere.
  """
  slots = jnp.where(reach.real, reach.positions, cache.keys.shape[2])
  rows = jnp.arange(len(slots))[:, None]
  keys, values = (
    old.at[:, rows, slots].set(x.astype(old.dtype), mode="drop")
    for old, x in zip((cache.keys, cache.values), new, strict=True)
  )
  added = jnp.sum(reach.real, axis=1, dtype=cache.positions.dtype)
  return Cache(keys, values, cache.positions + added)


class Pieces(NamedTuple):
  """What a family brings to a `Decoder`.

  Attributes:
    embeddings: a `Part`: (input_ids, positions) -> the hidden states, and the
      table of words [vocab, width].
    layer: a `Part`: (hidden states, its number, its keys and values in the
      cache or None, what all layers share) -> the hidden states, and with a
      cache the keys and values of the call's tokens.
    norm: (part, name) -> the module that normalises hidden states there.
    shared: (config, reach) -> what all layers share.
  """

  embeddings: type[Part]
  layer: type[Part]
  norm: Callable[[Part, str], nn.Module]
  shared: Callable[[Any, Reach], Any]


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
  ) -> tuple[Hidden, Pair | None]:
    count, layer = self.config.num_hidden_layers, self.pieces.layer
    new: Any = None
    if self.remat != "none":
      policy = REMAT_POLICIES[self.remat]
      layer = nn.remat(layer, policy=policy, prevent_cse=not self.scan)
    past = None if cache is None else (cache.keys, cache.values)
    if self.scan:
      stack = nn.scan(
        layer,
        variable_axes={True: 0},  # every collection, the adapter's too
        split_rngs={True: True},
        in_axes=(0, 0, nn.broadcast),
        length=count,
      )
      numbers = jnp.arange(count, dtype=jnp.int32)
      one = stack(*self.settings, name="layer")
      hidden, new = one(hidden, numbers, past, shared)
    else:
      pairs = []
      for index in range(count):
        one = layer(*self.settings, name=f"layer_{index}")
        own = None if past is None else (past[0][index], past[1][index])
        hidden, pair = one(hidden, index, own, shared)
        pairs.append(pair)
      if past is not None:
        new = tuple(jnp.stack(x) for x in zip(*pairs, strict=True))
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

  def __post_init__(self) -> None:
    check_remat(self.remat)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    input_ids: Ids,
    positions: Ids | None = None,
    segment_ids: Ids | None = None,
    read_positions: Reads | None = None,
    cache: Cache | None = None,
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
      deterministic: whether dropout is off.
    """
    config, pieces = self.config, self.pieces
    settings = (config, self.dtype, self.param_dtype, deterministic)
    reach = find_reach(
      input_ids,
      positions,
      segment_ids,
      cache,
      window=config.sliding_window,
      longest=self.longest,
    )
    if reach.whole.ndim == 4:
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
    words = Words(hidden, table.T)
    if cache is None or new is None:
      return words
    return words, fill(cache, new, reach)


class Head(Part):
  """The table of words that an untied network ends with.

  It is an embedding's leaf, since the files have it as they have that.
  """

  @nn.compact
  def __call__(self) -> Float[Array, "vocab width"]:
    config = self.config
    start = nn.initializers.normal(config.initializer_range)
    shape = (config.vocab_size, config.hidden_size)
    table = self.param("embedding", start, shape, self.param_dtype)
    return jnp.asarray(table, self.dtype)


def module(
  pieces: Pieces, config: Any, head: str, outputs: int, **options: Any
) -> Decoder:
  """`Family.module`, with a family's pieces; `outputs` are the vocabulary's.

  Raises:
    UserError: another head than that for words.
  """
  if head != HEAD:
    raise UserError(f"{config.model_type} has no head for {head} here.")
  return Decoder(config, pieces, **options)
