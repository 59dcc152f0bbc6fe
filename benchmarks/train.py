"""A whole fine-tuning run, from start to scores, against PEFT and torch.

  python -m benchmarks.train
  python -m benchmarks.train --task=sst2 --source=GLUE_FOLDER

Trains all-MiniLM-L6-v2 by configs/minilm.py: once here, as a user would, with
nothing compiled or tokenised before, and once in PEFT, batches padded to their
longest text. Same texts, weights, batch size, dtype, dropout, rates and epochs.
Each trainer is a process of its own, one after another.

Writes train-TASK.json, its table in Markdown and a plot. Where there is a GPU
its rows come after the CPU's. PEFT's and torch's rows need torch and peft, the
plot matplotlib: requirements-parity.txt.
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

from benchmarks.report import environment, load, write
from benchmarks.train_report import draw, markdown
from configs import minilm
from experiments import cli
from vera_jax.data.examples import subset
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.hub import resolve
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.glue_facts import glue_task
from vera_jax.tasks.metrics import score

METHODS = ("vera", "lora", "head", "full")
ADAPTED = METHODS[:2]
DEVICES = ("cpu", "gpu")
OURS, PEFT, TORCH = "vera_jax", "PEFT", "torch"
MODULES = {OURS: "train_ours", PEFT: "train_torch", TORCH: "train_torch"}
Outcome = dict[str, Any]


class Trainer(NamedTuple):
  """Who trains, by which method, on "cpu" or "gpu"."""

  side: str
  method: str
  device: str

  def __str__(self) -> str:
    return f"{self.side} {self.method} on {self.device}"


def define_flags() -> None:
  flags.DEFINE_string("task", "generated_entailment", "What is trained on.")
  flags.DEFINE_string("source", "experiments", "A folder of GLUE's files.")
  flags.DEFINE_integer("epochs", None, "Unset: the config's.", lower_bound=1)
  flags.DEFINE_integer(
    "examples", None, "Training examples; unset: the config's.", lower_bound=1
  )
  flags.DEFINE_list("methods", list(METHODS), "What is trained here.")
  flags.DEFINE_list(
    "peft", ["vera", "lora"], "What is trained in PEFT; head, full: in torch."
  )
  flags.DEFINE_list("devices", None, "cpu, gpu; unset: all that there are.")
  flags.DEFINE_integer(
    "repetitions", 1, "Runs of each, by turns; medians count.", lower_bound=1
  )
  flags.DEFINE_string("base", minilm.ENCODER, "The encoder.")
  flags.DEFINE_string("out", "results/benchmarks", "Where the files go.")


def main() -> None:
  given = flags.FLAGS
  config = minilm.get_config(given.task)
  config.model.name, config.data.source = given.base, given.source
  if given.epochs:
    config.optim.epochs = given.epochs
  if given.examples:
    config.data.max_train_examples = given.examples
  asked = choose(given.methods, given.peft, given.devices)
  load_before = load()
  chosen = [trainer for trainer in asked if can_run(trainer)]
  result = measure(config, chosen, repetitions=given.repetitions)
  result["left_out"] = [str(other) for other in asked if other not in chosen]
  # Only now, since it makes this process claim a GPU that the trainers need.
  result = environment("train") | {"load_before": load_before} | result
  path = write(f"train-{result['task']}", result, folder=given.out)
  table = markdown(result)
  path.with_suffix(".md").write_text(table, encoding="utf-8")
  print(f"\n{table}")
  if find_spec("matplotlib"):
    draw(result, path.with_suffix(".png"))
  else:
    print("Not drawn, since matplotlib is not installed.")
  print(path)


def choose(
  ours: list[str], theirs: list[str], devices: list[str] | None
) -> list[Trainer]:
  """Each method's trainers side by side, on one device after another."""
  if not devices:
    backend = _printed("import jax; print(jax.default_backend())")
    devices = ["cpu", "gpu"] if backend == "gpu" else ["cpu"]
  for names, known in (((*ours, *theirs), METHODS), (devices, DEVICES)):
    for name in names:
      if name not in known:
        raise UserError(
          f"There is no {name!r}; choose from {', '.join(known)}."
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
  config: ConfigDict, trainers: list[Trainer], *, repetitions: int
) -> dict[str, Any]:
  """All trainers' rows, and what they trained on."""
  texts = Texts(config)
  for side in {trainer.side for trainer in trainers}:
    # Read its libraries from the disk once, so that no run is charged for it.
    code = f"import benchmarks.{MODULES[side]}"
    code += ", peft" if side == PEFT else ""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
  outcomes: dict[Trainer, list[Outcome]] = {c: [] for c in trainers}
  turns = trainers * repetitions
  for number, trainer in enumerate(turns, 1):
    print(f"{number} of {len(turns)}: {trainer}", end="", flush=True)
    outcome = run(trainer, config, texts)
    print(f", {outcome['seconds']:.1f} s", flush=True)
    outcomes[trainer].append(outcome)
  tokens = texts.tokens * config.optim.epochs
  rows = [row(one, some, tokens=tokens) for one, some in outcomes.items()]
  return {
    "task": config.task,
    "base": config.model.name,
    "examples": len(texts.splits["train"]["first"]),
    "dev_examples": len(texts.labels),
    "epochs": config.optim.epochs,
    "batch_size": config.optim.batch_size,
    "max_length": config.data.max_length,
    "real_tokens_an_epoch": texts.tokens,
    "score_name": texts.task.metrics[0],
    "load_after": load(),
    "rows": [compared(row, rows) for row in rows],
  }


class Texts:
  """A config's texts and labels, as our own run reads them."""

  def __init__(self, config: ConfigDict) -> None:
    self.task = glue_task(config.task)
    self.base = resolve(config.model.name)
    self.splits: dict[str, dict[str, Any]] = {}
    for name in ("train", *self.task.dev_splits):
      found = load_split(self.task, config.data.source, name)
      if name == "train":
        size, seed = config.data.max_train_examples, config.data.subset_seed
        found = subset(found, size, seed)
      assert found.labels is not None  # only test splits lack them
      self.splits[name] = {
        "first": found.first,
        "second": found.second,
        "labels": found.labels.tolist(),
      }
    self.labels = self.splits[self.task.dev_splits[0]]["labels"]
    ids = load_tokenizer(self.base)(
      self.splits["train"]["first"],
      self.splits["train"]["second"],
      truncation=True,
      max_length=config.data.max_length,
    )["input_ids"]
    self.tokens = sum(map(len, ids))

  def scores(self, predictions: list[dict[str, list[float]]]) -> list[float]:
    """The task's score of each epoch's predictions."""
    main, dev = self.task.metrics[:1], self.task.dev_splits[0]
    labels = np.array(self.labels)
    return [
      score(main, np.array(epoch[dev]), labels)[main[0]]
      for epoch in predictions
    ]


def run(trainer: Trainer, config: ConfigDict, texts: Texts) -> Outcome:
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
    settings["config"]["data"]["cache_dir"] = str(folder / "tokens")
    if trainer.side != OURS:
      settings |= for_torch(trainer, texts)

    def start(workdir: str) -> Outcome:
      own = {"workdir": str(folder / workdir), "started": time.time()}
      request.write_text(json.dumps(settings | own))
      module = f"benchmarks.{MODULES[trainer.side]}"
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


def for_torch(trainer: Trainer, texts: Texts) -> dict[str, Any]:
  """What our own run finds out by itself."""
  cpu = trainer.device == "cpu"
  return {
    "base": str(texts.base),
    "splits": texts.splits,
    "dev_splits": texts.task.dev_splits,
    "outputs": texts.task.num_labels,
    "device": "cpu" if cpu else "cuda",
    "dtype": "float32" if cpu else "bfloat16",  # what "auto" is here, too
  }


def row(
  trainer: Trainer, outcomes: list[Outcome], *, tokens: int
) -> dict[str, Any]:
  """Medians over the runs; scores and counts are those of the first.

  Training is what remains of the seconds without imports and compilation:
  reading, steps, the evaluation of each epoch.
  """
  for outcome in outcomes:
    apart = outcome["imports"] + outcome["compilation"]
    outcome["training"] = outcome["seconds"] - apart
  medians = {
    name: statistics.median(outcome[name] for outcome in outcomes)
    for name in ("seconds", "imports", "compilation", "training", "peak_bytes")
  }
  first = outcomes[0]
  return {
    **trainer._asdict(),
    **medians,
    "device_peak_bytes": first["device_peak_bytes"],
    "tokens_a_second": tokens / medians["training"],
    "trained": first["trained"],
    "scores": first["scores"],
    "runs": outcomes,
  }


def compared(own: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
  """A row of ours with how many times as long the other side takes."""
  for other in rows:
    alike = all(other[key] == own[key] for key in ("method", "device"))
    if alike and own["side"] == OURS != other["side"]:
      return own | {
        "times_faster": other["seconds"] / own["seconds"],
        "times_faster_in_training": other["training"] / own["training"],
      }
  return own


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
