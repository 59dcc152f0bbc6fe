"""Dropout keys for the shards of a batch: together the whole batch's mask.

Threefry makes the bits of an array from its elements' flat indices. The rows
of shard n are elements n * size and on of the whole, so a key that also knows
its shard makes that part of the mask, and no device makes another's. It holds
for masks whose first axis is the rows.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import define_prng_impl, threefry2x32_p
from jaxtyping import Integer, Key, UInt32

from vera_jax.errors import UserError

WHOLE = "threefry2x32"
# A threefry key's two words, and the shard; alone, and several.
Words = UInt32[Array, "3"]
Many = UInt32[Array, "*n 3"]


def shard_keys(key: Key[Array, ""], shards: int) -> Key[Array, " shards"]:
  """A key for each shard; what is drawn from them, end on end, is `key`'s.

  Raises:
    UserError: the key is of another implementation than threefry.
  """
  if str(jax.random.key_impl(key)) != WHOLE:
    raise UserError(
      f"Over several batch shards dropout needs {WHOLE} keys, which are JAX's"
      f" own default; this key is {jax.random.key_impl(key)}. Unset"
      " JAX_DEFAULT_PRNG_IMPL."
    )
  words = jnp.broadcast_to(jax.random.key_data(key), (shards, 2))
  numbers = jnp.arange(shards, dtype=jnp.uint32)[:, None]
  words = jnp.concatenate([words, numbers], axis=1)
  return jax.random.wrap_key_data(words, impl=IMPL)


def _whole(words: Words) -> Key[Array, ""]:
  return jax.random.wrap_key_data(words[:2], impl=WHOLE)


def _with_shard(key: Key[Array, "*n"], words: Words) -> Many:
  made = jax.random.key_data(key)
  shard = jnp.broadcast_to(words[2:], (*made.shape[:-1], 1))
  return jnp.concatenate([made, shard], axis=-1)


def _seed(seed: Integer[Array, ""]) -> Words:
  made = jax.random.key_data(jax.random.key(seed, impl=WHOLE))
  return jnp.concatenate([made, jnp.zeros(1, jnp.uint32)])


def _split(words: Words, shape: tuple[int, ...]) -> Many:
  return _with_shard(jax.random.split(_whole(words), shape), words)


def _fold_in(words: Words, data: int | Integer[Array, ""]) -> Words:
  return _with_shard(jax.random.fold_in(_whole(words), data), words)


def _random_bits(
  words: Words, bit_width: int, shape: tuple[int, ...]
) -> UInt32[Array, "..."]:
  """As threefry's own, counting from where the shard's rows begin."""
  assert bit_width == 32, "dropout draws float32 numbers"
  high, low = _first_index(words[2], math.prod(shape))
  within = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :])
    places = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    within += places * jnp.uint32(stride)
  low = low + within
  high = high + (low < within).astype(jnp.uint32)
  keys = (jnp.broadcast_to(word, shape) for word in words[:2])
  return jnp.bitwise_xor(*threefry2x32_p.bind(*keys, high, low))


def _first_index(
  shard: UInt32[Array, ""], size: int
) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
  """shard * size in two words; both factors and their parts fit in one."""
  assert size < 2**32
  below = shard * jnp.uint32(size & 0xFFFF)
  above = shard * jnp.uint32(size >> 16)
  low = below + (above << 16)
  return (above >> 16) + (low < below).astype(jnp.uint32), low


IMPL = define_prng_impl(
  key_shape=(3,),
  seed=_seed,
  split=_split,
  random_bits=_random_bits,
  fold_in=_fold_in,
  name="threefry2x32_of_a_shard",
  tag="shard",
)
