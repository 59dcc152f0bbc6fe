"""What docs/rates.md predicted for VeRA's and LoRA's rates, and what came out.

  python -m benchmarks.rate_rule DIR [FOLDER]

DIR has the sweeps minilm, dinov2 and smollm2 of configs/sweeps/rate_rule.py, or
those of them that there are, perhaps unfinished: a setting counts once all of
its runs have a result. Prints its table, which is drawn into FOLDER, and one of
the rates that the paper has for GLUE.
"""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from configs.sweeps.rate_rule import FACTORS, PREDICTED, RATE_SEEDS, TARGETS
from experiments import cli
from vera_jax import results
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError
from vera_jax.report import tables
from vera_jax.report.frame import method_title
from vera_jax.report.style import (
  STYLE,
  grid,
  looks,
  save,
)
from vera_jax.report.words import task_title
from vera_jax.sweep.estimate import steps

STEPS = 300
GLUE = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")
NETWORKS = {"minilm": "MiniLM", "dinov2": "DINOv2", "smollm2": "SmolLM2"}
LAYERS = {"qv": "q, v", "all": "all linear"}
Setting = tuple[str, str, int, float, str]  # network, and a key of PREDICTED


def rate(distance: float, steps: int) -> float:
  """The rate by which random steps go so far while it falls to 0."""
  return distance / math.sqrt(steps / 3)


class Best(NamedTuple):
  """The best rate of a setting.

  Attributes:
    rate: the vertex of a parabola, or the end of the tried rates.
    low, high: its 95 % interval, within the tried rates; NaN without one.
    inside: whether worse rates were tried on both sides.
  """

  rate: float
  low: float
  high: float
  inside: bool


def best_rate(losses: Mapping[float, Sequence[float]]) -> Best:
  """From the held-out losses of the seeds at each rate.

  The parabola in log2 of the rate is fitted to the seeds at the best rate and
  the next ones on both sides; the interval is that of its vertex, by the delta
  method.
  """
  rates = sorted(losses)
  means = [float(np.mean(losses[rate])) for rate in rates]
  at = int(np.nanargmin(means))
  near = rates[max(at - 1, 0) : at + 2]
  finite = all(np.isfinite(losses[rate]).all() for rate in near)
  if len(near) < 3 or not finite:
    return Best(rates[at], math.nan, math.nan, 0 < at < len(rates) - 1)
  points = [
    (math.log2(rate / rates[at]), loss)
    for rate in near
    for loss in losses[rate]
  ]
  x, y = np.array(points).T
  (a, b, _), covariance = np.polyfit(x, y, 2, cov="unscaled")
  vertex = -b / (2 * a)
  rest = y - np.polyval((a, b, _), x)
  free = len(x) - 3
  slope = np.array([b / (2 * a**2), -1 / (2 * a), 0.0])
  variance = slope @ covariance @ slope * (rest @ rest) / max(free, 1)
  reach = stats.t.ppf(0.975, free) * math.sqrt(variance) if free else math.nan
  ends = np.log2(np.array(rates)[[0, -1]] / rates[at])
  low, high = np.clip([vertex - reach, vertex + reach], *ends)
  best, lowest, highest = (
    float(rates[at] * 2**power) for power in (vertex, low, high)
  )
  return Best(best, lowest, highest, True)


def loss_of(result: Mapping[str, Any]) -> float:
  """A run's held-out loss: of images, the share of errors."""
  score = result["last"]["score"]
  if result["score_name"].endswith("probability"):
    return -math.log(score) if score > 0 else math.inf
  return 1 - score


def setting_of(network: str, result: Mapping[str, Any]) -> Setting:
  """The setting that a run is one of."""
  method = result["method"]
  group = result["config"][method]
  size = group["alpha"] if method == "lora" else group["d_init"]
  layers = next(
    name
    for (of, name), targets in TARGETS.items()
    if of == network and [*targets] == [*group["targets"]]
  )
  return network, method, group["rank"], size, layers


def outcomes(folder: Path) -> Iterator[tuple[Setting, float, Best]]:
  """Of each finished setting: what it is, the prediction, the best rate."""
  losses: dict[Setting, dict[float, list[float]]] = {}
  for network in PREDICTED:
    for run in sorted((folder / network / "runs").glob("*")):
      result = results.read(run)
      if failed := results.read(run, results.FAILED):
        raise UserError(f"{run} failed: {failed}")
      if result is None:
        continue
      setting = setting_of(network, result)
      one = result["learning_rates"]["adapter_lr"]
      at = losses.setdefault(setting, {})
      at.setdefault(one, []).append(loss_of(result))
  for network, predicted in PREDICTED.items():
    for key, prediction in predicted.items():
      tried = losses.get((network, *key), {})
      if sum(map(len, tried.values())) == len(FACTORS) * len(RATE_SEEDS):
        yield (network, *key), prediction, best_rate(tried)


def holds(prediction: float, best: Best) -> bool:
  """Within a factor of two, and not at an end of what was tried."""
  return best.inside and 0.5 <= best.rate / prediction <= 2


def markdown(folder: Path) -> str:
  rows = []
  for (network, method, rank, size, layers), predicted, best in outcomes(
    folder
  ):
    interval = (
      "none" if math.isnan(best.low) else f"{best.low:.2g} to {best.high:.2g}"
    )
    rows.append(
      {
        "network": NETWORKS[network],
        "method": method_title(method),
        "r": f"{rank:,}",
        "d₀ or α": f"{size:g}",
        "layers": LAYERS[layers],
        "predicted": f"{predicted:.3g}",
        "best": f"{best.rate:.2g}" + ("" if best.inside else " (an end)"),
        "95 % interval": interval,
        "best / predicted": f"{best.rate / predicted:.2f}",
        "within two": "yes" if holds(predicted, best) else "no",
      }
    )
  return tables.markdown(pd.DataFrame(rows)) if rows else "No setting is done."


def figure(folder: Path) -> Figure:
  """Best rates against predictions, with the band of a factor of two."""
  with mpl.rc_context(STYLE):
    title = "Best and predicted rates"
    made, (ax,) = grid([4.2], width=None, least=4.0, title=title)
    # the networks differ in shade and filling
    drawn = {
      (network, method): line
      for method in ("vera", "lora")
      for network, line in zip(
        NETWORKS, looks([method] * len(NETWORKS)), strict=True
      )
    }
    ends = np.array([3e-4, 0.15])
    ax.fill_between(
      ends,
      ends / 2,
      ends * 2,
      alpha=0.15,
      color="#777777",
      lw=0,
      label="a factor of two",
    )
    ax.plot(ends, ends, color="#777777", lw=1)
    named: set[tuple[str, str]] = set()
    for (network, method, *_), predicted, best in outcomes(folder):
      kind = network, method
      reach = np.array([[best.rate - best.low], [best.high - best.rate]])
      ax.errorbar(
        predicted,
        best.rate,
        yerr=None if math.isnan(best.low) else reach,
        ms=6,
        capsize=2,
        lw=1,
        label=None
        if kind in named
        else f"{method_title(method)}, {NETWORKS[network]}",
        **{**drawn[kind], "linestyle": "none"},
      )
      named.add(kind)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ax.set(xlabel="predicted learning rate", ylabel="best learning rate")
    ax.legend(loc="upper left")
  return made


def papers() -> str:
  """The rule beside the paper's own rates for GLUE, which it was not made of.

  q and v of RoBERTa, 12 layers or 24, d_init 0.1.
  """
  rows = []
  for size, layers in (("base", 12), ("large", 24)):
    for task in GLUE:
      config = importlib.import_module(f"configs.{task}").get_config(size)
      count = steps(config)
      assert vera.distance is not None
      settings = vera.read(config.vera)
      made = rate(vera.distance(settings, [1] * 2 * layers), count)
      rows.append(
        {
          "task": task_title(task),
          "RoBERTa": size,
          "steps": f"{count:,}",
          "rule": f"{made:.2g}",
          "paper": f"{config.vera.lr:g}",
          "paper / rule": f"{config.vera.lr / made:.1f}",
        }
      )
  return tables.markdown(pd.DataFrame(rows))


def main(words: list[str]) -> None:
  if len(words) not in (1, 2):
    raise UserError("Name the folder of the study's sweeps, then the figure's.")
  folder = Path(words[0])
  print(markdown(folder))
  vera = [(p, best) for (_, m, *_), p, best in outcomes(folder) if m == "vera"]
  print(f"VeRA: {sum(holds(*one) for one in vera)} of {len(vera)} within two")
  print(papers())
  for out in map(Path, words[1:]):
    print(*save(figure(folder), out, "rate_rule", ["png"]))


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
