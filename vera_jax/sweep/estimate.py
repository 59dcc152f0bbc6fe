"""How much a run computes, and how long that takes.

Rough on purpose: tokens times weights. Finished runs of the same sweep say how
fast this machine really is, and then only the ratios matter.
"""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vera_jax.data.loader import steps_per_epoch
from vera_jax.files import read_json
from vera_jax.hub import PACKAGE
from vera_jax.models import roberta


class Size(NamedTuple):
  """Of a task: training and dev examples, mean tokens per example."""

  train: int
  dev: int
  tokens: int


# GLUE's own numbers of examples. Tokens: counted for sst2, cola and rte with
# BERT's tokenizer, by the length of the texts for the others.
SIZES = {
  "cola": Size(8551, 1043, 11),
  "sst2": Size(67349, 872, 13),
  "mrpc": Size(3668, 408, 53),
  "stsb": Size(5749, 1500, 31),
  "qqp": Size(363846, 40430, 31),
  "mnli": Size(392702, 19647, 40),
  "qnli": Size(104743, 5463, 51),
  "rte": Size(2490, 277, 70),
  "wnli": Size(635, 71, 38),
  "generated_entailment": Size(2000, 320, 28),
}
UNKNOWN = Size(10_000, 1000, 40)
# FLOP/s. MiniLM with VeRA on SST-2 took 77 s of training on two idle, slow CPU
# cores; the cores of results/benchmarks/train-sst2.md need 39 s.
TWO_CORES = 0.11e12
START = 25.0  # seconds of a worker before its first step, compiling included


def size_of(config: ConfigDict) -> Size:
  """Of a run's task, with `config.data.max_train_examples` at most."""
  size = SIZES.get(str(config.task), UNKNOWN)
  most = config.data.max_train_examples or size.train
  return size._replace(train=min(size.train, most))


def steps(config: ConfigDict) -> int:
  """Updates of a whole run, for a progress bar: exact for GLUE's tasks."""
  each = steps_per_epoch(size_of(config).train, config.optim.batch_size)
  return each * config.optim.epochs


def shape_of(name: str) -> tuple[int, int]:
  """(width, layers) of a model; RoBERTa-base's if nothing is known."""
  if name in roberta.SIZES:
    return roberta.SIZES[name]
  from vera_jax.hub import resolve

  if name.startswith(PACKAGE) or "/" in name:
    try:
      fields = read_json(resolve(name) / "config.json")
      return int(fields["hidden_size"]), int(fields["num_hidden_layers"])
    except Exception:  # an estimate is no reason to stop
      pass
  return roberta.SIZES["roberta-base"]


def flops(config: ConfigDict) -> float:
  """FLOPs of a whole run, evaluations included."""
  size, (width, layers) = size_of(config), shape_of(str(config.model.name))
  weights = 12 * layers * width**2
  method = config.method
  # forward: 2 FLOPs per weight and token; so is each of the two gradients,
  # of which that of the weights is needed for full fine-tuning alone
  per_token = {"head": 2, "full": 6}.get(method, 4) * weights
  if method in ("vera", "lora"):
    adapted = min(layers * len(config[method].targets), 6 * layers)
    per_token += 4 * config[method].rank * 2 * width * adapted
  tokens = min(size.tokens, config.data.max_length)
  epoch = size.train * per_token + size.dev * 2 * weights
  return float(config.optim.epochs * tokens * epoch)


class Rate(NamedTuple):
  """FLOP/s of one worker, and a phrase that says where they are known from."""

  flops: float
  source: str

  def seconds(self, configs: Iterable[ConfigDict]) -> float:
    """Seconds of one unit: a start, then all its runs."""
    total = sum(flops(config) for config in configs)
    return START + total / self.flops if total else 0.0


def rate(
  finished: Iterable[Mapping[str, Any]], tflops: float | None = None
) -> Rate:
  """The machine's rate: as given, else by the results of finished runs."""
  if tflops:
    return Rate(tflops * 1e12, f"at {tflops:g} TFLOP/s, as given")
  rates = [
    flops(ConfigDict(result["config"]))
    / max(result["seconds"] / result.get("members", 1), 1e-3)
    for result in finished
  ]
  if rates:
    return Rate(
      statistics.median(rates), f"by {len(rates)} finished runs of this sweep"
    )
  return Rate(
    TWO_CORES,
    "at what two CPU cores do (0.11 TFLOP/s; --tflops=N for another machine)",
  )


def span(seconds: float) -> str:
  """Seconds for a person: 40 s, 12 min, 3 h 20 min, 5 days."""
  if seconds < 90:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  if minutes < 120:
    return f"{minutes} min"
  if minutes < 48 * 60:
    return f"{minutes // 60} h {minutes % 60:02} min"
  return f"{minutes / 1440:.0f} days"
