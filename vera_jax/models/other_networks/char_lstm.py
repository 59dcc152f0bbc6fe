"""textgenrnn's character model: two LSTMs and an average by attention.

Each character is predicted from the window of the last 40, its text's beginning
marked by <s> and what is before that by 0, which the network has learned as it
has all others: nothing is masked. The LSTMs (Hochreiter and Schmidhuber 1997)
start anew in each window.

  h1 = LSTM(e)    h2 = LSTM(h1)    x = [e; h1; h2]
  softmax(U sum_t a_t x_t + c)     a = softmax(x w)

Rows may hold several texts, as a decoder's do; the windows of all read
positions are then what a batch is made of.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from vera_jax.errors import UserError
from vera_jax.models import decoder
from vera_jax.models.decoder import HEAD, Reads, Words
from vera_jax.models.family import (
  Family,
  Names,
  field_table,
  one_of,
  take_fields,
)
from vera_jax.operations.attention import Ids

KIND = "char_lstm"
INPUTS = ("input_ids", "positions", "read_positions")
ROOM = 2**30  # tokens: texts may be of any length, for only a window is seen
PADDING = 0  # the id of what is before a text
Windows = Int[Array, "rows reads window"]


@dataclasses.dataclass(frozen=True)
class CharLstmConfig:
  """The fields of a config.json that the model reads.

  Attributes:
    hidden_size: of each LSTM.
    window: how many characters the next one is predicted from.
    num_attention_heads: one, which no mesh splits.
  """

  model_type: str
  vocab_size: int
  embedding_size: int
  hidden_size: int
  num_hidden_layers: int
  window: int
  num_attention_heads: int = 1

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "CharLstmConfig":
    """Picks the model's fields; what it can't honour is a UserError."""
    one_of(fields, "model_type", (KIND,))
    return take_fields(cls, fields)


def windows(
  input_ids: Ids, positions: Ids, reads: Reads, *, window: int
) -> Windows:
  """The window that ends at each read position, padded in front."""
  back = jnp.arange(window - 1, -1, -1)[None, None]
  columns = jnp.maximum(reads[..., None] - back, 0)
  rows = jnp.arange(len(input_ids))[:, None, None]
  position = jnp.take_along_axis(positions, reads, axis=1)
  inside = back <= position[..., None]  # not of the text before it in the row
  return jnp.where(inside, input_ids[rows, columns], PADDING)


class Output(nn.Module):
  """Returns the inputs and the kernel of the logits' product, which the loss
  multiplies in blocks.

  The bias is the kernel's last row, for inputs that end in a 1.
  """

  config: CharLstmConfig
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, hidden: Float[Array, "rows reads width"]) -> Words:
    vocab, start = self.config.vocab_size, nn.initializers
    shape = hidden.shape[-1], vocab
    kernel = self.param("kernel", start.normal(0.02), shape, self.param_dtype)
    bias = self.param("bias", start.zeros, (vocab,), self.param_dtype)
    ones = jnp.ones((*hidden.shape[:-1], 1), self.dtype)
    return Words(
      jnp.concatenate([hidden, ones], axis=-1),
      jnp.concatenate([kernel, bias[None]]).astype(self.dtype),
    )


class CharLstm(nn.Module):
  """The network with its head for the next character.

  Attributes:
    config: of the network.
    dtype, param_dtype: of computing, and of the parameters.
  """

  config: CharLstmConfig
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    input_ids: Ids,
    positions: Ids | None = None,
    read_positions: Reads | None = None,
    *,
    deterministic: bool = True,
  ) -> Words:
    """What the logits are made of. Nothing is random.

    Args:
      input_ids: packed rows.
      positions: of each token in its text; None for one text in each row.
      read_positions: columns whose next characters are wanted; None for all.
      deterministic: has no meaning here.
    """
    config = self.config
    types: dict[str, Any] = {
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
    }
    columns = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
    all_columns = jnp.broadcast_to(columns, input_ids.shape)
    positions = all_columns if positions is None else positions
    reads = all_columns if read_positions is None else read_positions
    ids = windows(input_ids, positions, reads, window=config.window)
    embedding = nn.Embed(
      config.vocab_size, config.embedding_size, name="embeddings", **types
    )
    states = [embedding(ids.reshape(-1, config.window))]
    for number in range(config.num_hidden_layers):
      # flax has a cell's leaves under the cell's own name
      name = f"layer_{number}"
      cell = nn.LSTMCell(config.hidden_size, name=name, **types)
      states.append(nn.RNN(cell, name=f"{name}_over_time")(states[-1]))
    x = jnp.concatenate(states, axis=-1)
    score = nn.Dense(1, use_bias=False, name="attention", **types)(x)
    weights = jax.nn.softmax(score.astype(jnp.float32), axis=1)
    read = jnp.sum(x * weights.astype(self.dtype), axis=1)
    output = Output(config, self.dtype, self.param_dtype, name="lm_head")
    return output(read.reshape(*ids.shape[:2], -1))


def module(
  config: CharLstmConfig,
  head: str,
  outputs: int,
  *,
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  scan: bool,
  remat: str,
  longest: int | None = None,
) -> CharLstm:
  """`Family.module`: windows are as long as they are, whatever the rows.

  Raises:
    UserError: rematerialised layers.
  """
  if remat != "none":
    raise UserError(
      f"config.model.remat is {remat}; {KIND} has no rematerialised layers, for"
      " it is small: choose none, and with less memory a lower"
      " config.optim.microbatch_rows."
    )
  return CharLstm(config, dtype, param_dtype)


def input_shapes(rows: int, length: int, slots: int) -> dict[str, Any]:
  """A packed batch's arrays that the network takes."""
  every = decoder.input_shapes(rows, length, slots)
  return {name: every[name] for name in INPUTS}


FAMILY = {
  KIND: Family(
    config=CharLstmConfig.from_dict,
    fields=field_table(
      "embedding_size hidden_size num_hidden_layers vocab_size window",
      fixed={"num_attention_heads": (1, None)},
    ),
    module=module,
    inputs=input_shapes,
    names=Names(transposed=False),
    rules=(),
    room=lambda config: ROOM,
    classes={HEAD: "CharLstmForCausalLM"},
    output="lm_head/.*",
    stacks=False,
    own=True,
  )
}
