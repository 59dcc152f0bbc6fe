"""The other side of `benchmarks.decode`: llama.cpp, on the file that it gets.

Imports nothing of vera_jax, whose libraries would count as its own memory.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.llama_cpp import LlamaCpp
from benchmarks.process import Settings, converse


def start(settings: Settings) -> tuple[dict[str, Any], Callable[..., Any]]:
  """How many threads there are, and what answers our side's tokens."""
  file, new = Path(settings["file"]), settings["new_tokens"]
  tokens, threads = settings["tokens"], os.cpu_count() or 1
  room = -(-(max(map(len, tokens)) + new) // 32) * 32
  model = LlamaCpp(file, texts=len(tokens), room=room, threads=threads)

  def answer(*, prompts: int, beams: int) -> list[list[int]]:
    assert beams == 1
    return model.greedy(tokens[:prompts], new)

  return {"threads": threads, "weight_bytes": model.size}, answer


if __name__ == "__main__":
  converse(start)
