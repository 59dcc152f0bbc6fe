"""A whole fine-tuning run, from start to scores, against PEFT and torch.

  python -m benchmarks.train
  python -m benchmarks.train --task=sst2 --source=GLUE_FOLDER
  python -m benchmarks.train --task=e2e --source=E2E_FOLDER --methods=vera
  python -m benchmarks.train --task=cifar10 --source=FOLDER --seeds=0,1,2

Trains all-MiniLM-L6-v2 by configs/minilm.py: once here, as a user would, with
nothing compiled or tokenised before, and once in PEFT, batches padded to their
longest text. Same texts, weights, batch size, dtype, dropout, rates and epochs.
Each trainer is a process of its own, one after another. --task=e2e trains
SmolLM2 instead, to complete E2E's rows (`train_e2e.py`), --task=cifar10 DINOv2
on images (`train_images.py`).

Writes train-TASK.json and its table in Markdown. Where there is a GPU its rows
come after the CPU's. PEFT's and torch's rows need torch and peft:
requirements-parity.txt.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import train_e2e, train_images
from benchmarks.report import environment, load, write
from benchmarks.train_report import markdown
from configs import minilm
from experiments import cli
from vera_jax.data.examples import subset
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.models.folder import resolve
from vera_jax.operations.quantised import NONE, check_quantise
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.glue_facts import glue_task
from vera_jax.tasks.metrics import score

METHODS = ("vera", "lora", "head", "full")
ADAPTED = METHODS[:2]
DEVICES = ("cpu", "gpu")
OURS, PEFT, TORCH = "vera_jax", "PEFT", "torch"
Outcome = dict[str, Any]


class Trainer(NamedTuple):
  """Who trains, by which method, on "cpu" or "gpu"; how it keeps the base."""

  side: str
  method: str
  device: str
  quantise: str = NONE

  def __str__(self) -> str:
    kept = "" if self.quantise == NONE else f" ({self.quantise} base)"
    return f"{self.side} {self.method} on {self.device}{kept}"


def define_flags() -> None:
  flags.DEFINE_string("task", "generated_entailment", "What is trained on.")
  flags.DEFINE_string(
    "source", None, "Files of GLUE, E2E or images; unset: generated texts."
  )
  flags.DEFINE_integer("epochs", None, "Unset: the config's.", lower_bound=1)
  flags.DEFINE_integer(
    "examples", None, "Training examples; unset: the config's.", lower_bound=1
  )
  flags.DEFINE_list(
    "methods", None, "What is trained here; unset: all that the task has."
  )
  flags.DEFINE_list(
    "peft", list(ADAPTED), "What is trained in PEFT; head, full: in torch."
  )
  flags.DEFINE_list("devices", None, "cpu, gpu; unset: all that there are.")
  flags.DEFINE_integer(
    "repetitions", 1, "Runs of each, by turns; medians count.", lower_bound=1
  )
  flags.DEFINE_list(
    "seeds", None, "A seed for each repetition; unset: the config's for all."
  )
  flags.DEFINE_string("base", None, "The pretrained model; unset: MiniLM.")
  flags.DEFINE_list(
    "quantise", [NONE], "Values of config.model.quantise; a run here for each."
  )
  flags.DEFINE_string("out", "results/benchmarks", "Where the files go.")


def main() -> None:
  options = flags.FLAGS
  known: tuple[str, ...] = METHODS  # those that a task has
  files: Any = None  # what the sides read, where a folder is made for it
  if options.task == train_e2e.TASK:
    config, files, known = train_e2e.get_config(), train_e2e.Texts, ADAPTED
  elif options.task == train_images.TASK:
    config, files = train_images.get_config(), train_images.Images
    known = train_images.METHODS
  else:
    config = minilm.get_config(options.task)
    config.data.source = "experiments"
  if options.source:
    config.data.source = options.source
  if options.base:
    config.model.name = options.base
  if options.epochs:
    config.optim.epochs = options.epochs
  if options.examples:
    config.data.max_train_examples = options.examples
  for kept in options.quantise:
    check_quantise(kept)
  seeds = options.seeds or [config.seed] * options.repetitions
  try:
    seeds = [int(seed) for seed in seeds]
  except ValueError:
    raise UserError(
      f"--seeds={','.join(options.seeds)}; give whole numbers, as in 0,1,2."
    ) from None
  methods = list(known) if options.methods is None else options.methods
  asked = trainers_for(methods, options.peft, options.devices, known=known)
  asked = [
    trainer._replace(quantise=kept)
    for trainer in asked
    for kept in (options.quantise if trainer.side == OURS else [NONE])
  ]
  load_before = load()
  chosen = [trainer for trainer in asked if can_run(trainer)]
  with tempfile.TemporaryDirectory() as name:
    texts = files(config, Path(name)) if files else Texts(config)
    result = measure(config, texts, chosen, seeds=seeds)
  result["left_out"] = [str(other) for other in asked if other not in chosen]
  # Only now, since it makes this process claim a GPU that the trainers need.
  result = environment("train") | {"load_before": load_before} | result
  path = write(f"train-{result['task']}", result, folder=options.out)
  table = markdown(result)
  path.with_suffix(".md").write_text(table, encoding="utf-8")
  print(f"\n{table}\n{path}")


def trainers_for(
  ours: list[str],
  theirs: list[str],
  devices: list[str] | None,
  *,
  known: tuple[str, ...] = METHODS,
) -> list[Trainer]:
  """Each method's trainers side by side, on one device after another."""
  if not devices:
    backend = _printed("import jax; print(jax.default_backend())")
    devices = ["cpu", "gpu"] if backend == "gpu" else ["cpu"]
  for names, choices in (((*ours, *theirs), known), (devices, DEVICES)):
    for name in names:
      if name not in choices:
        raise UserError(
          f"There is no {name!r}; choose from {', '.join(choices)}."
        )
  sides = [(OURS, name) for name in ours]
  sides += [(PEFT if name in ADAPTED else TORCH, name) for name in theirs]
  sides.sort(key=lambda side: METHODS.index(side[1]))
  return [Trainer(*side, device) for device in devices for side in sides]


def can_run(trainer: Trainer) -> bool:
  """Whether its libraries are installed, for its device."""
  if trainer.side == OURS:
    return True
  libraries = ["torch", "peft"] if trainer.side == PEFT else ["torch"]
  if not all(map(find_spec, libraries)):
    return False
  cuda = "import torch; print(torch.cuda.is_available())"
  return trainer.device == "cpu" or _printed(cuda) == "True"


def _printed(code: str) -> str:
  """What another process prints, so that this one never claims a GPU."""
  asked = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  return asked.stdout.strip()


def measure(
  config: ConfigDict, texts: Any, trainers: list[Trainer], *, seeds: list[int]
) -> dict[str, Any]:
  """All trainers' rows, and what they trained on: the config's `Texts`.

  Every trainer has a run for each of the seeds, all by turns.
  """
  for side in {trainer.side for trainer in trainers}:
    # Read its libraries from the disk once, so that no run is charged for it.
    code = f"import benchmarks.{texts.modules[side]}"
    code += ", peft" if side == PEFT else ""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
  outcomes: dict[Trainer, list[Outcome]] = {c: [] for c in trainers}
  turns = [(seed, trainer) for seed in seeds for trainer in trainers]
  for number, (seed, trainer) in enumerate(turns, 1):
    config.seed = seed
    print(f"{number} of {len(turns)}: {trainer}", end="", flush=True)
    outcome = run(trainer, config, texts)
    print(f", {outcome['seconds']:.1f} s", flush=True)
    outcomes[trainer].append(outcome)
  count = texts.count * config.optim.epochs
  scored = texts.dev_examples if texts.unit == "images" else 0
  rows = [
    row(one, some, count=count, unit=texts.unit, scored=scored)
    for one, some in outcomes.items()
  ]
  size: dict[str, Any] = {
    "max_length": config.data.max_length,
    "real_tokens_an_epoch": texts.count,
  }
  if texts.unit == "images":
    size = {"image_size": texts.image_size, "seeds": seeds}
  return {
    "task": texts.name,
    "base": texts.title,
    "examples": texts.examples,
    "dev_examples": texts.dev_examples,
    "epochs": config.optim.epochs,
    "batch_size": config.optim.batch_size,
    **size,
    "score_name": texts.score_name,
    "load_after": load(),
    "rows": [compared(row, rows) for row in rows],
  }


class Texts:
  """A config's texts and labels, as our own run reads them."""

  modules = {OURS: "train_ours", PEFT: "train_torch", TORCH: "train_torch"}
  unit = "tokens"  # what `count` counts, per epoch

  def __init__(self, config: ConfigDict) -> None:
    self.name, self.title = config.task, config.model.name
    self.task = glue_task(config.task)
    self.score_name = self.task.metrics[0]
    self.base = resolve(config.model.name)
    self.splits: dict[str, dict[str, Any]] = {}
    for name in ("train", *self.task.dev_splits):
      examples = load_split(self.task, config.data.source, name)
      if name == "train":
        size, seed = config.data.max_train_examples, config.data.subset_seed
        examples = subset(examples, size, seed)
      assert examples.labels is not None  # only test splits lack them
      self.splits[name] = {
        "first": examples.first,
        "second": examples.second,
        "labels": examples.labels.tolist(),
      }
    self.labels = self.splits[self.task.dev_splits[0]]["labels"]
    ids = load_tokenizer(self.base)(
      self.splits["train"]["first"],
      self.splits["train"]["second"],
      truncation=True,
      max_length=config.data.max_length,
    )["input_ids"]
    self.count = sum(map(len, ids))
    self.examples, self.dev_examples = len(ids), len(self.labels)

  def for_torch(self, config: ConfigDict) -> dict[str, Any]:
    """What our own run finds out by itself."""
    return {
      "base": str(self.base),
      "splits": self.splits,
      "dev_splits": self.task.dev_splits,
      "outputs": len(self.task.labels) or 1,
    }

  def scores(self, predictions: list[dict[str, list[float]]]) -> list[float]:
    """The task's score of each epoch's predictions."""
    main, dev = self.task.metrics[:1], self.task.dev_splits[0]
    labels = np.array(self.labels)
    return [
      score(main, np.array(epoch[dev]), labels)[main[0]]
      for epoch in predictions
    ]


def run(trainer: Trainer, config: ConfigDict, texts: Any) -> Outcome:
  """One trainer's run, all its caches empty.

  Ours compiles while it trains. How long that takes is measured by a second
  run, which finds the programs that the first one has left in the cache.

  Raises:
    UserError: the run failed; with the last lines that it printed.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    request, answer = folder / "request.json", folder / "answer.json"
    variables = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    if trainer.device == "cpu":
      variables["JAX_PLATFORMS"] = "cpu"
    settings: dict[str, Any] = {"config": config.to_dict()}
    settings["config"]["method"] = trainer.method
    settings["config"]["model"]["quantise"] = trainer.quantise
    settings["config"]["data"]["cache_dir"] = str(folder / "tokens")
    if trainer.side != OURS:
      settings |= texts.for_torch(config) | place_of(trainer)

    def start(workdir: str) -> Outcome:
      place_and_time = {
        "workdir": str(folder / workdir),
        "started": time.time(),
      }
      request.write_text(json.dumps(settings | place_and_time))
      module = f"benchmarks.{texts.modules[trainer.side]}"
      done = subprocess.run(
        [sys.executable, "-m", module, request, answer],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-15:])
        raise UserError(f"\n{trainer} failed; its last lines:\n{end}")
      return json.loads(answer.read_text())

    outcome = start("run")
    if trainer.side == OURS:
      again = start("second")
      outcome["compilation"] = outcome["seconds"] - again["seconds"]
    else:
      outcome["scores"] = texts.scores(outcome.pop("predictions"))
  return outcome


def place_of(trainer: Trainer) -> dict[str, str]:
  """Where torch computes, and in what: what "auto" is here, too."""
  if trainer.device == "cpu":
    return {"device": "cpu", "dtype": "float32"}
  return {"device": "cuda", "dtype": "bfloat16"}


def row(
  trainer: Trainer,
  outcomes: list[Outcome],
  *,
  count: int,
  unit: str,
  scored: int = 0,
) -> dict[str, Any]:
  """Medians over the runs; scores and counts are those of the first.

  Training is what remains of the seconds without imports and compilation:
  reading, steps, and for texts the evaluation of each epoch.

  Args:
    trainer, outcomes: whose runs these are.
    count: the tokens or images, by `unit`, that a run trains on.
    scored: images that a run is scored on, where evaluation is a part apart.
  """
  parts = ["imports", "compilation", *(["evaluation"] if scored else [])]
  for outcome in outcomes:
    apart = sum(outcome[part] for part in parts)
    outcome["training"] = outcome["seconds"] - apart
  medians = {
    name: statistics.median(outcome[name] for outcome in outcomes)
    for name in ("seconds", *parts, "training", "peak_bytes")
  }
  first = outcomes[0]
  return {
    **trainer._asdict(),
    **medians,
    "device_peak_bytes": first["device_peak_bytes"],
    f"{unit}_a_second": count / medians["training"],
    **({"scored_a_second": scored / medians["evaluation"]} if scored else {}),
    "trained": first["trained"],
    "train_loss": first.get("train_loss"),
    "scores": first["scores"],
    "runs": outcomes,
  }


def compared(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
  """A row of ours with how many times as long the other side takes."""
  for other in rows:
    alike = all(other[key] == row[key] for key in ("method", "device"))
    if alike and row["side"] == OURS != other["side"]:
      made = row | {
        "times_faster": other["seconds"] / row["seconds"],
        "times_faster_in_training": other["training"] / row["training"],
      }
      if "evaluation" in row:
        theirs, ours = (x["training"] + x["compilation"] for x in (other, row))
        made["times_faster_with_compiling"] = theirs / ours
        between = other["evaluation"] / row["evaluation"]
        made["times_faster_in_evaluation"] = between
      return made
  return row


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
