"""Our side of `benchmarks.decode`: the generator that users have."""

from collections.abc import Callable
from typing import Any

import jax

from benchmarks.process import Settings, converse
from vera_jax.generate.beam import Beam
from vera_jax.generate.generator import Generator
from vera_jax.generate.sampling import GREEDY
from vera_jax.pretrained.classifier import load_classifier
from vera_jax.train.runtime import prepare


def start(settings: Settings) -> tuple[dict[str, Any], Callable[..., Any]]:
  """The prompts' tokens, for the other side, and what answers them."""
  prepare()
  options: dict[str, Any] = {"scan": False}
  weights = settings.get("weights")
  if weights in ("Q8_0", "the file's codes"):
    options["quantise"] = "keep"
  elif weights == "bfloat16":
    options["dtype"] = "bfloat16"
  name: str = settings.get("file") or settings["folder"]
  generator = Generator(load_classifier(name, **options))
  new = settings["new_tokens"]
  tokens = [
    generator.encode(prompt, max_new_tokens=new)
    for prompt in settings["prompts"]
  ]

  def answer(*, prompts: int, beams: int) -> list[list[int]]:
    how = GREEDY if beams == 1 else Beam(beams=beams)
    return generator.ids(tokens[:prompts], how=how, max_new_tokens=new, eos=())

  leaves = jax.tree.leaves(generator.variables)
  return {
    "tokens": tokens,
    "pad": generator.tokenizer.pad_token_id,
    "weight_bytes": sum(leaf.nbytes for leaf in leaves),
  }, answer


if __name__ == "__main__":
  converse(start)
