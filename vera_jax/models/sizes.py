"""The sizes in a config.json, held against those of the weights beside it.

What a config.json says is built before a weight is looked at. A layer too many
costs a moment, a thousand million of them the machine; so does one head that is
as wide. Sizes that are only a little wrong are left to whoever compares each
tensor with its place.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vera_jax.errors import UserError

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers")
WIDTHS = (
  "dim",
  "embedding_size",
  "expand",
  "head_dim",
  "hidden_dim",
  "hidden_size",
  "intermediate_size",
  "kernel",
  "last_width",
  "n_embd",
  "n_head",
  "n_heads",
  "n_inner",
  "num_attention_heads",
  "num_channels",
  "num_key_value_heads",
  "patch_size",
  "stem_width",
  "stride",
  "type_vocab_size",
  "vocab_size",
  "width",
  "window",
)
IMAGE = "image_size"
# Whatever the weights are, so much can be built in a moment.
FEW, NARROW, PIXELS = 128, 2**17, 2**13


def check_sizes(
  fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Refuse a config.json of a far larger network than the weights are of.

  Args:
    fields: of config.json.
    shapes: of the tensors beside it, by name.

  Raises:
    UserError: it is; the message names the field.
  """
  widest = max((size for shape in shapes.values() for size in shape), default=0)
  most = {
    **dict.fromkeys(LAYERS, max(FEW, len(shapes))),
    **dict.fromkeys(WIDTHS, max(NARROW, widest)),
    IMAGE: PIXELS,
  }
  for name, value in _numbers(fields):
    if name in most and value > most[name]:
      raise UserError(
        f"config.json: {name} is {value:,}, but the weights are {len(shapes):,}"
        f" tensors, the widest of {widest:,} rows or columns. Is it theirs?"
      )


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
  """The numbers of config.json, those in its lists of stages too."""
  for name, value in fields.items():
    if isinstance(value, int | float):
      yield name, value
    for part in value if isinstance(value, list) else ():
      if isinstance(part, Mapping):
        yield from _numbers(part)
