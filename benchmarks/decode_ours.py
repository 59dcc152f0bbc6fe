"""Our side of `benchmarks.decode`: the generator that users have."""

from collections.abc import Callable
from typing import Any

from benchmarks.process import Settings, converse
from vera_jax.generate.beam import Beam
from vera_jax.generate.generator import Generator
from vera_jax.generate.sampling import GREEDY
from vera_jax.pretrained.classifier import load_classifier
from vera_jax.train.runtime import prepare


def start(settings: Settings) -> tuple[dict[str, Any], Callable[..., Any]]:
  """The prompts' tokens, for the other side, and what answers them."""
  prepare()
  generator = Generator(load_classifier(settings["folder"], scan=False))
  new = settings["new_tokens"]
  tokens = [
    generator.encode(prompt, max_new_tokens=new)
    for prompt in settings["prompts"]
  ]

  def answer(*, prompts: int, beams: int) -> list[list[int]]:
    how = GREEDY if beams == 1 else Beam(beams=beams)
    return generator.ids(tokens[:prompts], how=how, max_new_tokens=new, eos=())

  return {"tokens": tokens, "pad": generator.tokenizer.pad_token_id}, answer


if __name__ == "__main__":
  converse(start)
