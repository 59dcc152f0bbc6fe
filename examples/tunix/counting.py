"""What the two examples train: a tiny random Llama of tunix's, which counts.

A text is a digit and the four that follow it: 7 8 9 0 1, without spaces.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vera_jax.errors import UserError, install

try:
  from tunix.models.llama3.model import Llama3, ModelConfig
except ImportError as error:
  raise UserError(
    f"tunix can't be imported ({error}): {install('tunix')}"
  ) from error

DIGITS, LENGTH = "0123456789", 4  # what follows the first digit
ALPHABET = "_^$" + DIGITS  # for padding, at the start, at the end


class Characters:
  """A tokenizer of tunix's kind: a character is a token."""

  def encode(self, text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]

  def decode(self, tokens: list[int]) -> str:
    return "".join(ALPHABET[token] for token in tokens)

  def pad_id(self) -> int:
    return 0

  def bos_id(self) -> int:
    return 1

  def eos_id(self) -> int:
    return 2


def count_on(digit: str) -> str:
  """7 -> 8901."""
  return "".join(DIGITS[(int(digit) + n) % 10] for n in range(1, LENGTH + 1))


def share_counted(digit: str, text: str) -> float:
  """The share of characters that follow the one before them."""
  pairs = zip(digit + text, text[:LENGTH], strict=False)
  right = [a + b in DIGITS + DIGITS[0] for a, b in pairs]
  return sum(right) / LENGTH


def tiny_llama(*, width: int) -> Llama3:
  """Two layers of random weights, the same ones each time."""
  config = ModelConfig(
    num_layers=2,
    vocab_size=len(ALPHABET),
    embed_dim=width,
    hidden_dim=2 * width,
    num_heads=4,
    head_dim=width // 4,
    num_kv_heads=2,
    rope_theta=1_000_000,
    norm_eps=1e-5,
  )
  model = Llama3(config, rngs=nnx.Rngs(0))
  keys = nnx.Rngs(1)
  for _, module in nnx.iter_modules(model):
    # tunix leaves the feed-forward kernels at zero, for a checkpoint to fill:
    # nothing would pass through them, and no gradient.
    if isinstance(module, nnx.Linear):
      shape = module.kernel.shape
      kernel = jax.random.normal(keys.params(), shape) / np.sqrt(shape[0])
      module.kernel.set_value(kernel)
  return model


def one_device() -> Mesh:
  """The mesh of the examples."""
  return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def put_on(mesh: Mesh, model: nnx.Module) -> None:
  """Have the arrays of a model on a mesh, where a cluster's roles share them.

  tunix copies a model that lies elsewhere, for each of them.
  """
  everywhere = NamedSharding(mesh, PartitionSpec())
  nnx.update(model, jax.device_put(nnx.state(model), everywhere))


def model_inputs(tokens: jax.Array) -> dict[str, jax.Array]:
  """What tunix's models want beside tokens, of texts without padding."""
  rows, length = tokens.shape
  causal = jnp.tril(jnp.ones((length, length), bool))
  return {
    "positions": jnp.tile(jnp.arange(length), (rows, 1)),
    "attention_mask": jnp.tile(causal, (rows, 1, 1)),
  }


@nnx.jit
def accuracy(model: Llama3, texts: jax.Array) -> jax.Array:
  """The share of the counted characters that are the likeliest ones."""
  inputs = model_inputs(texts)
  logits, _ = model(texts, inputs["positions"], None, inputs["attention_mask"])
  return jnp.mean(logits[:, 1:-1].argmax(-1) == texts[:, 2:])
