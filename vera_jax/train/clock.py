"""Where a run's time goes: seconds per step, tokens per second, goodput.

Only the clock is read, at points that the loop comes to anyway; no device is
waited for on its account.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vera_jax.results import SPEED

# start: imports, data and model. compiling: with it the whole first step.
# data: waiting for a batch. result: adapter, answers and texts, at the end.
# lost: from the save that a process went on from until that process began, in
# which steps were trained that are trained again, or nothing ran.
PARTS = (
  *("start", "compiling", "steps", "data", "evaluation", "saving"),
  *("profiling", "lost", "result"),
)
SHOWN = {
  "step_seconds": "{:.3g} s per step",
  "tokens_per_second": "{:,.0f} tokens per second",
  "mfu": "{:.0%} of the chips' peak",
  "goodput": "goodput {:.0%}",
}


class Clock:
  """A program's seconds by part; each second belongs to one of them.

  Attributes:
    began: when the program began, as a Unix time.
    seconds: of each part, up to the last call of `took`.
    last: when that was, as a Unix time.
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
    self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

  @property
  def last(self) -> float:
    return self.began + sum(self.seconds.values())

  def took(self, part: str) -> None:
    """All the time since the last call went into this part."""
    now = self._now()
    self.seconds[part] += now - self._last
    self._last = now


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
      clock: of the program that trains now, maybe together with other runs,
        and maybe since long before this one.
      earlier: as `report` gave it at that save; empty at the first start.
      since: when the run first began, as a Unix time.
      peak: FLOP/s of all devices together, if it is known.
    """
    self._clock, self._earlier, self._peak = clock, earlier, peak
    self._first = dict(clock.seconds)
    self._before = dict.fromkeys(PARTS, 0.0) | earlier.get("seconds", {})
    known = sum(self._before.values())
    self._before["lost"] += max(0.0, clock.last - since - known)
    self._recorded = 0
    self._trained = np.zeros(3)  # steps, tokens and FLOPs
    self._written = self._counts()

  def record(self, *, tokens: float, flops: float) -> None:
    """A step has been trained whose metrics have come."""
    self._recorded += 1
    if self._recorded == 1:  # it was compiled as well
      return
    self._trained += (1, tokens, flops)
    # An accelerator runs one step while the one before is recorded, so that the
    # seconds are those of a step less; from here on each adds one.
    if self._recorded == 2:
      self._written = self._counts()

  def metrics(self) -> dict[str, float]:
    """The speed since the last call, and the goodput since the first start."""
    before, self._written = self._written, self._counts()
    values = self._rates(self._written - before)
    if values:
      values["goodput"] = goodput(self._seconds())
    return {f"{SPEED}{name}": value for name, value in values.items()}

  def report(self) -> dict[str, Any]:
    """JSON values for saves and result.json.

    The rates are those of the last process that has trained two steps.
    """
    return {
      **self._earlier,
      **self._rates(self._counts()),
      "starts": self._earlier.get("starts", 0) + 1,
      "goodput": goodput(self._seconds()),
      "seconds": self._seconds(),
      **_peak_bytes(),
    }

  def _seconds(self) -> dict[str, float]:
    now, first = self._clock.seconds, self._first
    return {p: self._before[p] + now[p] - first[p] for p in PARTS}

  def _counts(self) -> np.ndarray:
    seconds = self._seconds()
    training = [seconds[p] - self._before[p] for p in ("steps", "data")]
    return np.array([*self._trained, *training])

  def _rates(self, counts: np.ndarray) -> dict[str, float]:
    """The metrics of these steps; what can't be known is left out."""
    steps, tokens, flops, training, waiting = map(float, counts)
    if not steps:
      return {}
    seconds = max(training + waiting, 1e-9)
    rates = {"step_seconds": seconds / steps, "data_wait": waiting / seconds}
    if tokens:
      rates["tokens_per_second"] = tokens / seconds
    if flops:
      rates["flops_per_second"] = flops / seconds
    if flops and self._peak:
      rates["mfu"] = flops / seconds / self._peak
    return rates


def _peak_bytes() -> dict[str, int]:
  """The most memory that this process had of its first device, if it says."""
  memory = jax.local_devices()[0].memory_stats() or {}
  peak = memory.get("peak_bytes_in_use")
  return {} if peak is None else {"peak_bytes": int(peak)}


def goodput(seconds: Mapping[str, float]) -> float:
  """The share of all time in which steps were trained that count."""
  return seconds["steps"] / max(sum(seconds.values()), 1e-9)


def with_result(speed: Mapping[str, Any], seconds: float) -> dict[str, Any]:
  """What the last save reported, and the seconds of writing the result."""
  if not speed:  # the save is of a version that didn't measure it
    return {}
  parts = {**speed["seconds"]}
  parts["result"] += seconds  # those of others of its ensemble came before
  return {**speed, "goodput": goodput(parts), "seconds": parts}


def sentence(speed: Mapping[str, Any]) -> str:
  """The speed in a line, for a person."""
  shown = [SHOWN[name].format(speed[name]) for name in SHOWN if name in speed]
  return ", ".join(shown)
