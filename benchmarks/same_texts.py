"""Whether a GGUF file's model writes here what it writes in llama.cpp.

  python -m benchmarks.same_texts --model=networks/gemma-3-270m-q4_k_m.gguf

The file is rewritten to float32, so that both multiply the same numbers. Each
side continues the same prompts by the likeliest token. Where two texts part,
the table has the two tokens' logits there, as both sides compute them: a
difference that is smaller than that between the sides is a tie.

Writes same-texts.json and its table in Markdown. Needs llama.cpp, which
requirements-parity.txt brings.
"""

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.llama_cpp import LlamaCpp
from benchmarks.report import environment, write
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.generate.generator import Generator
from vera_jax.generate.sampling import GREEDY
from vera_jax.hub import PACKAGE, package_place
from vera_jax.models.decoder import logits
from vera_jax.models.gguf_file import Written, read_gguf, write_gguf
from vera_jax.pretrained.classifier import load_classifier

PROMPTS = (
  "The capital of France is",
  "Once upon a time there was a small village by the sea, where",
  "Water boils at",
  "def fibonacci(n):\n",
  "My favourite recipe for bread needs flour,",
  "The three primary colours are",
  "In 1969 the first people",
  "Der schnellste Weg nach Berlin ist",
  "Les oiseaux chantent quand",
  "To be, or not to be,",
  "name : The Blue Spice | Type : coffee shop | area : city centre\n",
  "Q: What is 12 + 30?\nA:",
  "The heart pumps blood through",
  "import numpy as np\n\n",
  "Dear Sir or Madam,\n\nI am writing to",
  "The difference between a frog and a toad is",
  "El perro de mi hermana",
  "A triangle has three sides and",
  "News: the price of oil",
  "She opened the door and saw",
)


class Parting(NamedTuple):
  """Where a text parts from the other: tokens before, the two, their logits."""

  prompt: int
  before: int
  tokens: tuple[int, int]
  ours: tuple[float, float]
  theirs: tuple[float, float]


def define_flags() -> None:
  flags.DEFINE_string("model", None, "A GGUF file.", required=True)
  flags.DEFINE_integer("prompts", len(PROMPTS), "How many.", lower_bound=1)
  flags.DEFINE_integer("new_tokens", 64, "Tokens of an answer.", lower_bound=1)
  flags.DEFINE_integer(
    "threads", os.cpu_count() or 1, "Of llama.cpp.", lower_bound=1
  )
  flags.DEFINE_string("out", "results/benchmarks", "Where the files go.")


def main() -> None:
  options = flags.FLAGS
  name = options.model
  source = package_place(name) if name.startswith(PACKAGE) else Path(name)
  result = environment("same_texts") | {"model": name}
  with tempfile.TemporaryDirectory() as folder:
    file = in_float32(source, Path(folder) / "float32.gguf")
    generator = Generator(load_classifier(file))
    new, prompts = options.new_tokens, PROMPTS[: options.prompts]
    tokens = [generator.encode(x, max_new_tokens=new) for x in prompts]
    ours = generator.ids(tokens, how=GREEDY, max_new_tokens=new, eos=())
    print("ours are written", flush=True)
    room = max(map(len, tokens)) + new
    peer = LlamaCpp(
      file, texts=len(prompts), room=room, threads=options.threads
    )
    theirs = peer.greedy(tokens, new=new)
    partings = [
      part(generator, peer, number, *texts)
      for number, texts in enumerate(zip(tokens, ours, theirs, strict=True))
      if texts[1] != texts[2]
    ]
  result |= {"prompts": len(prompts), "new_tokens": new}
  result["same"] = len(prompts) - len(partings)
  result["partings"] = [x._asdict() for x in partings]
  path = write("same-texts", result, folder=options.out)
  page = markdown(result)
  path.with_suffix(".md").write_text(page, encoding="utf-8")
  print(f"\n{page}\n{path}")


def in_float32(source: Path, file: Path) -> Path:
  """A copy of a GGUF file whose tensors are all float32."""
  gguf = read_gguf(source)

  def values(name: str) -> np.ndarray:
    return gguf.values(name).astype(np.float32)

  write_gguf(
    file,
    gguf.metadata,
    {
      name: Written("F32", tensor.shape, partial(values, name))
      for name, tensor in gguf.tensors.items()
    },
  )
  return file


def part(
  generator: Generator,
  peer: LlamaCpp,
  number: int,
  prompt: list[int],
  ours: list[int],
  theirs: list[int],
) -> Parting:
  """Where two texts part, and what both sides compute there."""
  before = [x == y for x, y in zip(ours, theirs, strict=True)].index(False)
  context, tokens = prompt + ours[:before], (ours[before], theirs[before])
  run = jax.jit(generator.decoder.module.apply)
  words = run(generator.decoder.variables, jnp.asarray([context]))
  here = np.asarray(logits(words)[0, -1])
  there = peer.logits(context)[-1]
  return Parting(
    number,
    before,
    tokens,
    *((float(x[tokens[0]]), float(x[tokens[1]])) for x in (here, there)),
  )


def markdown(result: dict[str, Any]) -> str:
  """The table of what differs, and what it was found with."""
  table = markdown_table(
    ["prompt", "tokens before", "our two logits", "llama.cpp's"],
    [
      [
        PROMPTS[x["prompt"]].strip().splitlines()[0],
        x["before"],
        *(f"{x[side][0]:.5f}, {x[side][1]:.5f}" for side in ("ours", "theirs")),
      ]
      for x in result["partings"]
    ],
    texts=1,
  )
  return (
    f"{result['same']} of {result['prompts']} texts of {result['new_tokens']}"
    f" tokens are the same, `{result['command']}`.\n\n"
    + (table + "\n" if result["partings"] else "")
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
