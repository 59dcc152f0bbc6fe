"""Where a run's time goes: seconds per step, tokens per second, goodput.

Only the clock is read, at points that the loop comes to anyway; no device is
waited for on its account.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from vera_jax.results import SPEED

# start: imports, data and model. compiling: with it the whole first step.
# data: waiting for a batch. result: adapter, answers and texts, at the end.
# lost: from the save that a process went on from until that process began, in
# which steps were trained that are trained again, or nothing ran.
Part = Literal[
  "start",
  "compiling",
  "steps",
  "data",
  "evaluation",
  "saving",
  "profiling",
  "lost",
  "result",
]


class Clock:
  """A program's seconds by part; each second belongs to one of them.

  Attributes:
    began: when the program began, as a Unix time.
    seconds: of each part, up to the last call of `took`.
  """

  def __init__(
    self,
    began: float,
    *,
    now: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
  ) -> None:
    """`began` is on the clock `now`; `wall` gives Unix times."""
    self._now, self._last = now, began
    self.began = wall() - (now() - began)
    self.seconds: dict[str, float] = dict.fromkeys(get_args(Part), 0.0)

  def took(self, part: Part) -> None:
    """All the time since the last call went into this part."""
    now = self._now()
    self.seconds[part] += now - self._last
    self._last = now


class Counts(NamedTuple):
  """What a process has trained since its first step, and the seconds of it."""

  steps: int = 0
  tokens: float = 0.0
  flops: float = 0.0
  seconds: float = 0.0
  waiting: float = 0.0


class Speed:
  """A run's speed and parts of time, from its first start, by all processes."""

  def __init__(
    self,
    clock: Clock,
    earlier: Mapping[str, Any],
    *,
    since: float,
    peak: float | None = None,
  ) -> None:
    """Go on from what a save holds.

    Args:
      clock: of the program that trains now, maybe together with other runs.
      earlier: as `report` gave it at that save; empty at the first start.
      since: when the run first began, as a Unix time.
      peak: FLOP/s of all devices together, if it is known.
    """
    self._clock, self._earlier, self._peak = clock, earlier, peak
    before = sum(earlier.get("seconds", {}).values())
    self._lost = max(0.0, clock.began - since - before)
    self._recorded, self._counts = 0, Counts()
    self._written: Counts | None = None

  def record(self, *, tokens: float, flops: float) -> None:
    """A step has been trained whose metrics have come."""
    self._recorded += 1
    if self._recorded == 1:  # it was compiled as well
      return
    steps, seconds = self._counts.steps + 1, self._clock.seconds
    self._counts = Counts(
      steps,
      self._counts.tokens + tokens,
      self._counts.flops + flops,
      seconds["steps"] + seconds["data"],
      seconds["data"],
    )
    # An accelerator runs one step while the one before is recorded, so that the
    # seconds are those of a step less; from here on each adds one.
    self._written = self._written or self._counts

  def metrics(self) -> dict[str, float]:
    """The speed since the last call, and the goodput since the first start."""
    before, now = self._written, self._counts
    self._written = now
    if before is None or before.steps == now.steps:
      return {}
    since = Counts._make(
      new - old for new, old in zip(now, before, strict=True)
    )
    values = self._rates(since) | {"goodput": goodput(self._seconds())}
    return {f"{SPEED}{name}": value for name, value in values.items()}

  def report(self) -> dict[str, Any]:
    """JSON values for saves and result.json.

    The rates are those of the last process that has trained two steps.
    """
    seconds = self._clock.seconds
    waiting = seconds["data"]
    counts = self._counts._replace(
      seconds=seconds["steps"] + waiting, waiting=waiting
    )
    return {
      **self._earlier,
      **(self._rates(counts) if counts.steps else {}),
      "starts": self._earlier.get("starts", 0) + 1,
      "goodput": goodput(self._seconds()),
      "seconds": self._seconds(),
    }

  def _seconds(self) -> dict[str, float]:
    earlier = self._earlier.get("seconds", {})
    seconds = self._clock.seconds
    seconds = seconds | {"lost": seconds["lost"] + self._lost}
    return {part: earlier.get(part, 0.0) + n for part, n in seconds.items()}

  def _rates(self, counts: Counts) -> dict[str, float]:
    """The metrics of these steps; what can't be known is left out."""
    seconds = max(counts.seconds, 1e-9)
    rates = {
      "step_seconds": seconds / counts.steps,
      "data_wait": counts.waiting / seconds,
    }
    if counts.tokens:
      rates["tokens_per_second"] = counts.tokens / seconds
    if counts.flops:
      rates["flops_per_second"] = counts.flops / seconds
      if self._peak:
        rates["mfu"] = counts.flops / seconds / self._peak
    return rates


def goodput(seconds: Mapping[str, float]) -> float:
  """The share of all time in which steps were trained that count."""
  return seconds["steps"] / max(sum(seconds.values()), 1e-9)


def with_result(speed: Mapping[str, Any], seconds: float) -> dict[str, Any]:
  """What the last save reported, and the seconds of writing the result."""
  if not speed:  # the save is of a version that didn't measure it
    return {}
  parts = {**speed["seconds"], "result": seconds}
  return {**speed, "goodput": goodput(parts), "seconds": parts}


def sentence(speed: Mapping[str, Any]) -> str:
  """The speed in a line, for a person."""
  parts = []
  if "step_seconds" in speed:
    parts.append(f"{speed['step_seconds']:.3g} s per step")
  if "tokens_per_second" in speed:
    parts.append(f"{speed['tokens_per_second']:,.0f} tokens per second")
  if "mfu" in speed:
    parts.append(f"{speed['mfu']:.0%} of the chips' peak")
  parts.append(f"goodput {speed['goodput']:.0%}")
  return ", ".join(parts)
