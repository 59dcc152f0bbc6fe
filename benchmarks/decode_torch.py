"""The baseline of `benchmarks.decode`: transformers' generate, on torch.

Imports nothing of vera_jax, whose libraries would count as its own memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.process import Settings, converse

GGUF = "model.gguf"  # in the folder that a GGUF file is given


def start(settings: Settings) -> tuple[dict[str, Any], Callable[..., Any]]:
  """How many threads there are, and what answers our side's tokens."""
  gguf = (Path(settings["folder"]) / GGUF).exists()
  model: Any = AutoModelForCausalLM.from_pretrained(
    settings["folder"],
    dtype=torch.float32,
    **({"gguf_file": GGUF} if gguf else {}),
  ).eval()
  model.generation_config.eos_token_id = None  # nothing ends a text
  new, pad = settings["new_tokens"], settings["pad"]

  @torch.inference_mode()
  def answer(*, prompts: int, beams: int) -> list[list[int]]:
    tokens = settings["tokens"][:prompts]
    width = max(map(len, tokens))
    tokens_out = model.generate(
      torch.tensor([[pad] * (width - len(ids)) + ids for ids in tokens]),
      attention_mask=torch.tensor(
        [[0] * (width - len(ids)) + [1] * len(ids) for ids in tokens]
      ),
      max_new_tokens=new,
      pad_token_id=pad,
      num_beams=beams,
      do_sample=False,
    )
    return tokens_out[:, width:].tolist()

  return {"threads": torch.get_num_threads()}, answer


if __name__ == "__main__":
  converse(start)
