"""A piece of a transformer: settings that all pieces share, and its layers."""

from typing import Any

import flax.linen as nn
from jax import Array
from jax.typing import DTypeLike

from vera_jax.operations.dropout import dropout


class Part(nn.Module):
  """A piece of a network: the settings that all share, and their layers.

  `deterministic` is an attribute, hence static under scan and remat.
  """

  config: Any
  dtype: DTypeLike
  param_dtype: DTypeLike
  deterministic: bool

  @property
  def settings(self) -> tuple[Any, DTypeLike, DTypeLike, bool]:
    return self.config, self.dtype, self.param_dtype, self.deterministic

  @nn.nowrap
  def dense(self, features: int, name: str, *, bias: bool = True) -> nn.Dense:
    return nn.Dense(
      features,
      use_bias=bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=nn.initializers.normal(self.config.initializer_range),
      name=name,
    )

  @nn.nowrap
  def embed(self, rows: int, name: str) -> nn.Embed:
    return nn.Embed(
      rows,
      self.config.hidden_size,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      embedding_init=nn.initializers.normal(self.config.initializer_range),
      name=name,
    )

  @nn.nowrap
  def dropout(self, hidden: Array, rate: float) -> Array:
    if self.deterministic or rate == 0:
      return hidden
    return dropout(self.make_rng("dropout"), hidden, rate)
