"""All models by others, by name."""

from tests.adapters.architectures import Decoder
from tests.adapters.others import (
  big_vision,
  flax_examples,
  flaxdiff,
  lifted,
  resnets,
  scenic,
  t5x,
)
from tests.adapters.others.other import Other, ids

GEMMA = {
  "gemma's decoder, scanned": Other(
    "google-deepmind/gemma: Einsum, Attention, FeedForward",
    Decoder(scan=True),
    (ids(2, 5, below=11),),
    axes={
      "q_einsum": (1,),
      "kv_einsum": (2,),
      "attn_vec_einsum": (0, 1),
      "Einsum_0": (2,),
      "Einsum_1": (0,),
    },
  )
}
MODELS: dict[str, Other] = {
  name: model
  for origin in (
    *(resnets, big_vision, scenic, flax_examples),
    *(t5x, flaxdiff, lifted),
  )
  for name, model in origin.MODELS.items()
} | GEMMA
