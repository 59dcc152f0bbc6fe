"""AdamW with a learning rate of its own for adapter and head (section 4.1)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optax
from jax import Array
from jaxtyping import Float
from ml_collections import ConfigDict

from vera_jax.adapters.labels import ADAPTER, FROZEN, HEAD
from vera_jax.adapters.methods import METHODS, groups_of, settings_in
from vera_jax.errors import UserError

LINEAR, COSINE = SCHEDULES = ("linear", "cosine")
EPS = 1e-8  # optax's own
AUTO = "auto"  # an adapter's rate, by the rule
Number = float | Float[Array, ""]  # traced: each run of an ensemble has its own


def schedule(
  peak: Number, *, steps: int, warmup_ratio: float, decay: str = LINEAR
) -> optax.Schedule:
  """Linear from 0 to `peak`, then to 0 at the last step.

  Args:
    peak: the highest rate.
    steps: of the whole training.
    warmup_ratio: the share of them that the rate rises in.
    decay: how it falls, "linear" or "cosine", half of a wave.

  Raises:
    UserError: another `decay`.
  """
  if decay not in SCHEDULES:
    raise UserError(
      f"config.optim.schedule is {decay!r}; choose {' or '.join(SCHEDULES)}."
    )
  warmup = int(warmup_ratio * steps)
  rest = max(steps - warmup, 1)
  falling = optax.linear_schedule(peak, 0.0, rest)
  if decay == COSINE:
    falling = optax.cosine_decay_schedule(peak, rest)
  rising = optax.linear_schedule(0.0, peak, max(warmup, 1))
  return optax.join_schedules([rising, falling], [warmup])


def optimiser(
  labels: Mapping[str, Any],
  *,
  adapter_lr: Number,
  head_lr: Number,
  steps: int,
  warmup_ratio: float = 0.06,
  weight_decay: Number = 0.0,
  grad_clip: float | None = None,
  eps: float = EPS,
  decay: str = LINEAR,
) -> optax.GradientTransformation:
  """One transformation by label; a frozen leaf has no slot and no update.

  `optax.partition` is today's name of `optax.multi_transform`. Clipping, by the
  global norm over adapter and head, sees trainable gradients only: the step
  takes no others.
  """

  def adamw(peak: Number) -> optax.GradientTransformation:
    rate = schedule(peak, steps=steps, warmup_ratio=warmup_ratio, decay=decay)
    return optax.adamw(rate, eps=eps, weight_decay=weight_decay)

  by_label = optax.partition(
    {
      ADAPTER: adamw(adapter_lr),
      HEAD: adamw(head_lr),
      FROZEN: optax.set_to_zero(),
    },
    dict(labels),
  )
  if grad_clip is None:
    return by_label
  return optax.chain(optax.clip_by_global_norm(grad_clip), by_label)


class Extent(NamedTuple):
  """What an automatic rate depends on beside the method's settings.

  Attributes:
    inputs: of each adapted layer.
    steps: of the whole training.
  """

  inputs: Sequence[int]
  steps: int


def automatic_rate(config: ConfigDict, extent: Extent) -> float:
  """The adapter's rate by the rule of docs/rates.md.

  Random steps at a rate that falls to 0 go rate * sqrt(steps / 3) far.

  Raises:
    UserError: there is no rule for the method, or not for its settings.
  """
  known = [name for name, line in METHODS.items() if line.distance]
  method = METHODS.get(config.method)
  if method is None or method.distance is None:
    raise UserError(
      f"config.optim.adapter_lr={AUTO}: no rule is known for {config.method},"
      f" only for {' and '.join(known)}. Give a number."
    )
  settings = method.read(settings_in(config, config.method))
  try:
    distance = method.distance(settings, extent.inputs)
  except UserError as error:
    raise UserError(
      f"config.optim.adapter_lr={AUTO}: {error}. Give a number."
    ) from error
  return distance / math.sqrt(extent.steps / 3)


def learning_rates(
  config: ConfigDict, extent: Extent | None = None
) -> dict[str, float]:
  """`config.optim`'s rates, or where they are unset the method's own.

  A chain's are those of its first method. `extent` is needed where the
  adapter's is automatic.
  """
  group = config[next(iter(groups_of(config.method).values()))]
  adapter, head = config.optim.adapter_lr, config.optim.head_lr
  if adapter == AUTO:
    if extent is None:
      raise UserError(f"config.optim.adapter_lr={AUTO}: give a number here.")
    adapter = automatic_rate(config, extent)
  return {
    "adapter_lr": group.get("lr", 0.0) if adapter is None else adapter,
    "head_lr": group.head_lr if head is None else head,
  }


def rates_at(
  step: int, config: ConfigDict, *, extent: Extent
) -> dict[str, float]:
  """The rates of a step, the first of which is 1, for whoever watches a run.

  As `schedule` has them, without a program on a device.
  """
  optim, done, steps = config.optim, step - 1, extent.steps
  warmup = int(optim.warmup_ratio * steps)
  if done < warmup:
    share = done / warmup
  else:
    share = 1 - min(1.0, (done - warmup) / max(steps - warmup, 1))
    if optim.get("schedule", LINEAR) == COSINE:
      share = (1 - math.cos(math.pi * share)) / 2
  rates = learning_rates(config, extent)
  return {name: share * x for name, x in rates.items()}


def rates_of(
  config: ConfigDict, extent: Extent | None = None
) -> dict[str, float]:
  """The optimiser's numbers, of which each run of an ensemble has its own."""
  rates = learning_rates(config, extent)
  return {**rates, "weight_decay": config.optim.weight_decay}
