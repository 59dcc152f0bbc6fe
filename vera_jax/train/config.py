"""Settings that can't work are refused before anything is loaded."""

import math
from collections.abc import Callable

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vera_jax.adapters.counting import plans_at
from vera_jax.adapters.interface import Target
from vera_jax.adapters.method import SEEDS
from vera_jax.adapters.methods import (
  METHODS,
  groups_of,
  make_adapter,
  settings_in,
)
from vera_jax.adapters.plans import AUTO, check_plan
from vera_jax.errors import UserError
from vera_jax.models.part import REMATS
from vera_jax.operations.quantised import NONE, check_quantise
from vera_jax.pretrained.blueprint import choose_scan
from vera_jax.tasks import task
from vera_jax.train.optim import AUTO as AUTO_RATE
from vera_jax.train.optim import SCHEDULES, Extent, automatic_rate
from vera_jax.train.profile import steps_in

MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.runs")
# What every config has, and the type of a value that is set.
NEEDED: dict[str, type] = {
  **dict.fromkeys(("task", "method", "model.name", "model.dtype"), str),
  **dict.fromkeys(("model.contraction", "model.remat", "log.wandb"), str),
  **dict.fromkeys(("data.source", "data.cache_dir"), str),
  **dict.fromkeys(("seed", "eval_batch_size", "log.every"), int),
  **dict.fromkeys(("data.max_length", "data.max_train_examples"), int),
  **dict.fromkeys(("optim.epochs", "optim.batch_size"), int),
  **dict.fromkeys(("optim.microbatch_rows", "optim.patience"), int),
  **dict.fromkeys(MESH, int),
  "optim.head_lr": float,
  **dict.fromkeys(("optim.grad_clip", "optim.weight_decay"), float),
  "optim.warmup_ratio": float,
  **dict.fromkeys(("model.scan", "optim.adapter_lr"), object),
  "predict_test": bool,
}
SET = (  # and those that can't be left open
  *("method", "seed", "model.contraction", "model.scan"),
  *(*MESH, "optim.warmup_ratio"),
)
NOT_NEGATIVE = (
  "optim.adapter_lr",
  "optim.head_lr",
  "optim.weight_decay",
  "data.subset_seed",
  "data.shift",
)
DTYPES = ("auto", "float32", "bfloat16")
CHOICES = {
  "model.dtype": DTYPES,
  "model.remat": REMATS,
  "optim.schedule": SCHEDULES,
}
# Names of settings, which of their values are allowed, and how that is said.
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
  (
    (
      "optim.epochs",
      "optim.batch_size",
      "optim.microbatch_rows",
      "optim.patience",
      "eval_batch_size",
      "eval_epochs",
      "log.every",
      "data.max_length",
      "data.max_train_examples",
      "data.max_eval_examples",
      "data.shots",
      "data.dev_shots",
      "data.image_size",
    ),
    lambda value: value >= 1,
    "at least 1 is needed",
  ),
  (
    MESH,
    lambda value: value >= 1 or value == -1,
    "1 or more is needed, or -1 for what is left over",
  ),
  (
    ("optim.grad_clip",),
    lambda value: 0 < value < math.inf,
    "a norm above 0 is needed; unset clips nothing",
  ),
  (
    ("optim.eps",),
    lambda value: 0 < value < math.inf,
    "a finite number above 0 is needed",
  ),
  (
    ("optim.warmup_ratio",),
    lambda value: 0 <= value <= 1,
    "it is a share of the steps, from 0 to 1",
  ),
  (
    ("seed",),
    lambda value: 0 <= value < SEEDS,
    f"choose a whole number from 0 to {SEEDS - 1}",
  ),
)
RATE = "optim.adapter_lr"
KINDS = {
  str: "a text",
  int: "a whole number",
  float: "a number",
  bool: "True or False",
  object: "a value",
}


def check_settings(config: ConfigDict) -> None:
  """Refuse a run's settings that are unset or out of their range.

  Raises:
    UserError: names all of them, with what is allowed.
  """
  _check_form(config)
  try:  # all else depends on it
    settings = settings_in(config, config.method)
  except UserError as error:
    text = str(error)  # of a setting, or a sentence
    prefix = "" if text.startswith("The config") else "config."
    raise UserError(f"{prefix}{text}") from error
  group = next(iter(groups_of(config.method).values()))
  values = flatten_dict(config.to_dict(), sep=".")
  needed = ["task", "optim.epochs"]
  for rate, of_method in (("adapter_lr", "lr"), ("head_lr", "head_lr")):
    if config.optim[rate] is None and of_method in config[group]:
      needed.append(f"{group}.{of_method}")
  unset = [f"config.{name}" for name in needed if values[name] is None]
  wrong = [f"Without a value are: {', '.join(unset)}."] if unset else []
  if values["task"] is None:
    wrong.append(f"The tasks are: {', '.join(task.names())}.")

  def refuse(name: str, allowed: str) -> None:
    wrong.append(f"config.{name} is {values[name]}; {allowed}.")

  for names, allowed, words in RANGES:
    for name in names:
      value = values.get(name)
      if value is not None and not allowed(value):
        refuse(name, words)
  for name in (*NOT_NEGATIVE, f"{group}.lr", f"{group}.head_lr"):
    value = values.get(name)
    if value is None or (name == RATE and value == AUTO_RATE):
      continue
    if not 0 <= value < math.inf:
      refuse(name, "it must be a finite number, 0 or above")
  for name, choices in CHOICES.items():
    if name in values and values[name] not in choices:
      refuse(name, f"choose {', '.join(choices)}")
  if values[RATE] == AUTO_RATE:
    try:  # of one layer and step: whether there is a rule
      automatic_rate(config, Extent((1,), 1))
    except UserError as error:
      wrong.append(str(error))
  epochs, between = values["optim.epochs"], values.get("eval_epochs") or 1
  if epochs is not None and epochs % between:
    refuse("eval_epochs", f"a divisor of the {epochs} epochs is needed")

  def check_method() -> None:
    adapter, targets = make_adapter(config.method, settings)
    plan = check_plan(config.model.contraction)
    if targets and plan != AUTO:  # any site shows whether it can be done so
      for link in adapter.methods:
        one = link._replace(on=())
        plans_at(one, {("site",): Target(2, 2)}, {("site",): 1}, plan=plan)

  for check in (
    lambda: choose_scan(config.model.scan, layers=1, platform="cpu"),
    lambda: check_quantise(config.model.get("quantise", NONE)),
    lambda: steps_in(config.log.get("profile", "")),
    check_method,
  ):
    try:
      check()
    except UserError as error:
      wrong.append(str(error))
  if wrong:
    raise UserError("\n".join(wrong))


def _check_form(config: ConfigDict) -> None:
  """Refuse a config that lacks what all have, or has it of another type."""
  values = flatten_dict(config.to_dict(), sep=".")
  if lacking := [f"config.{name}" for name in NEEDED if name not in values]:
    raise UserError(
      f"The config lacks {', '.join(lacking)}: begin with one of those in"
      " configs/, as configs/rte.py does, and change what is to differ."
    )
  wrong = []
  for name, kind in NEEDED.items():
    value, kinds = values[name], (int, float) if kind is float else kind
    fits = isinstance(value, kinds)
    if isinstance(value, bool):
      fits = kind in (bool, object)
    if value is None:
      fits = name not in SET
    needed = KINDS[kind]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == RATE and not (number or value is None):
      fits, needed = value == AUTO_RATE, f"a number, or {AUTO_RATE},"
    if not fits:
      wrong.append(f"config.{name} is {value!r}; {needed} is needed.")
  if wrong:
    raise UserError("\n".join(wrong))


def without_effect(config: ConfigDict) -> set[str]:
  """The settings, by flat key, that the method of a config has no use for."""
  settings = settings_in(config, config.method)
  adapter, targets = make_adapter(config.method, settings)
  used = groups_of(config.method).values()
  idle = {
    f"{group}.{name}"
    for group in METHODS
    if group not in used
    for name in config.get(group, {})
  }
  if all(link.low_rank is None for link in adapter.methods):
    idle.add("model.contraction")
  if not targets and adapter.trains is None:
    idle.add("optim.adapter_lr")
  return idle
