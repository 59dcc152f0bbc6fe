"""How much a run computes, and how long that takes.

Rough on purpose: tokens times weights. Finished runs of the same sweep say how
fast this machine really is, and then only the ratios matter.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vera_jax.adapters.base_leaves import ALL
from vera_jax.adapters.methods import by_link, make_adapter, settings_in
from vera_jax.data.loader import steps_per_epoch
from vera_jax.errors import UserError
from vera_jax.hub import PACKAGE
from vera_jax.models.family import load_config
from vera_jax.models.folder import resolve
from vera_jax.models.paper_sizes import OTHERS, SIZES
from vera_jax.tasks.task import Size, task_for

UNKNOWN = Size(10_000, 1000, 40)
# FLOP/s. MiniLM with VeRA on SST-2 took 77 s of training on two idle, slow CPU
# cores; the cores of results/benchmarks/train-sst2.md need 39 s.
TWO_CORES = 0.11e12
START = 25.0  # seconds of a worker before its first step, compiling included
# By task and data, each read once: a live table asks every two seconds.
_SIZES: dict[str, Size] = {}


def size_of(config: ConfigDict) -> Size:
  """Of a run's task, with `config.data.max_train_examples` at most."""
  data = json.dumps([config.task, config.data.to_dict()], sort_keys=True)
  if data not in _SIZES:
    try:
      _SIZES[data] = task_for(config).presentation.size or UNKNOWN
    except UserError:
      pass
  size = _SIZES.get(data, UNKNOWN)
  most = config.data.max_train_examples or size.train
  return size._replace(train=min(size.train, most))


def steps(config: ConfigDict) -> int:
  """Updates of a whole run; exact where the task says its size."""
  each = steps_per_epoch(size_of(config).train, config.optim.batch_size)
  return each * config.optim.epochs


@cache
def shape_of(name: str) -> tuple[int, int]:
  """(width, layers) of a model; those of a base model if nothing is known."""
  if shape := (SIZES | OTHERS).get(name):
    return shape
  if name.startswith(PACKAGE) or "/" in name:
    try:
      config = load_config(resolve(name))
      # layers of a convolutional network are not as wide as its last one
      width = getattr(config, "mean_width", config.hidden_size)
      return width, config.num_hidden_layers
    except Exception:  # an estimate is no reason to stop
      pass
  return 768, 12


def flops(config: ConfigDict, size: Size | None = None) -> float:
  """FLOPs of a whole run, evaluations included.

  Args:
    config: of the run.
    size: of its data. Unset: `size_of`.
  """
  size = size or size_of(config)
  width, layers = shape_of(str(config.model.name))
  weights = 12 * layers * width**2
  # Forward: 2 FLOPs per weight and token. The inputs' gradient takes as many,
  # where anything below the head is trained; so does that of whole kernels.
  settings = settings_in(config, config.method)
  adapter, targets = make_adapter(config.method, settings)
  per_token = 2 * weights
  if targets or adapter.trains:
    per_token += 2 * weights
  if adapter.trains == ALL:
    per_token += 2 * weights
  if config.model.remat == "full":  # each layer's forward pass again
    per_token += 2 * weights
  if targets:
    adapted = min(layers * len(targets), 6 * layers)
    groups = by_link(config.method, settings).values()
    rank = sum(group.get("rank", 0) for group in groups)
    per_token += 4 * rank * 2 * width * adapted
  tokens = min(size.tokens, config.data.max_length or size.tokens)
  epochs = config.optim.epochs
  evaluations = epochs / (config.get("eval_epochs") or 1)
  trained = epochs * size.train * per_token
  return float(tokens * (trained + evaluations * size.dev * 2 * weights))


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
  rates = []
  for result in finished:
    with suppress(Exception):  # an estimate is no reason to stop
      seconds = max(result["seconds"] / result.get("members", 1), 1e-3)
      rates.append(flops(ConfigDict(result["config"])) / seconds)
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
