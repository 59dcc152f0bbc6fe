"""Score against data, and where the methods' curves cross (docs/data.md).

  python -m benchmarks.data_curve DIR LIMITS FOLDER

DIR is the sweep of configs/sweeps/data.py, LIMITS that of what may limit VeRA.
Prints a table of means with their 95 % intervals, one of each method's
difference from VeRA by pairs of seeds, with the sizes of data at which it
changes its sign, and one of how near each of LIMITS comes to LoRA, r = 8. Draws
the first into FOLDER. `benchmarks.docs` puts the tables into the page.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy import stats

from configs.sweeps.data import DRAWS, LIMITS, METHODS
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.errors import UserError
from vera_jax.report.frame import load_sweep
from vera_jax.report.style import METHOD_COLORS, STYLE, grid, save

NAMES = {
  "vera": "VeRA, r = 256",
  "lora 1": "LoRA, r = 1",
  "lora 8": "LoRA, r = 8",
  "lora_xs": "LoRA-XS, r = 25",
  "full": "full fine-tuning",
  "rank": "VeRA, r = 1,024",
  "dvora": "DVoRA, r = 256",
  "pair cola": "VeRA, r = 256, a pair trained on CoLA",
  "pair sst2": "VeRA, r = 256, a pair trained on SST-2's other sentences",
}
DRAWN = {
  f"draw {seed}": f"VeRA, r = 256, draw {seed} of A and B" for seed in DRAWS
}
STUDY, LIMITING = (
  Path("results/sweeps/data"),
  Path("results/sweeps/data_limits"),
)
CURVES = 20_000  # that are drawn for the interval of a crossing
# A method's scores in percent, by its name and the number of sentences, in the
# order of the seeds.
Scores = Mapping[str, Mapping[int, Sequence[float]]]


def read(folder: Path) -> Scores:
  """Raises:
  UserError: a method or a size has another number of seeds than the others.
  """
  scores: dict[str, dict[int, dict[int, float]]] = defaultdict(
    lambda: defaultdict(dict)
  )
  for run in load_sweep(folder).runs.to_dict("records"):
    config = run["result"]["config"]
    size = config["data"]["max_train_examples"]
    scores[named(config)][size][run["seed"]] = run["score"]
  cells = {
    (name, size): tuple(sorted(by_seed))
    for name, sizes in scores.items()
    for size, by_seed in sizes.items()
  }
  if len(set(cells.values())) != 1:
    raise UserError(f"{folder} is not finished: its seeds are {cells}.")
  return {
    name: {
      size: [by_seed[seed] for seed in sorted(by_seed)]
      for size, by_seed in sorted(scores[name].items())
    }
    for name in [*METHODS, *LIMITS, *DRAWN]
    if name in scores
  }


def named(config: Mapping[str, Any]) -> str:
  """The name in `configs.sweeps.data` of what a run has."""
  method, vera = config["method"], config["vera"]
  if method == "lora":
    return f"lora {config['lora']['rank']}"
  if method != "vera":
    return str(method)
  if vera["pair"]:
    return Path(vera["pair"]).name.replace("_", " ")
  if vera["projection_seed"]:
    return f"draw {vera['projection_seed']}"
  return "rank" if vera["rank"] == LIMITS["rank"]["vera.rank"] else "vera"


def interval(values: Sequence[float]) -> tuple[float, float]:
  """The mean, and half of its 95 % interval by Student's t."""
  error = stats.sem(values)
  return float(np.mean(values)), float(
    stats.t.ppf(0.975, len(values) - 1) * error
  )


def differences(scores: Scores, name: str) -> dict[int, list[float]]:
  """A method's score minus VeRA's on the same sentences, by size."""
  return {
    size: [a - b for a, b in zip(values, scores["vera"][size], strict=True)]
    for size, values in scores[name].items()
  }


def crossings(sizes: Sequence[int], means: np.ndarray) -> list[float]:
  """Where a line through the points, in the logarithm of the size, is 0."""
  logs = np.log2(sizes)
  return [
    2 ** (x0 - y0 * (x1 - x0) / (y1 - y0))
    for (x0, x1), (y0, y1) in zip(
      zip(logs, logs[1:], strict=False),
      zip(means, means[1:], strict=False),
      strict=True,
    )
    if (y0 < 0) != (y1 < 0)
  ]


def crossing(by_size: Mapping[int, Sequence[float]]) -> str:
  """In words: the last crossing, and its interval.

  Curves are drawn whose points are the means, each moved by its standard error
  times a number of Student's distribution. The interval is that of the last
  crossings of those that cross at all.
  """
  sizes = list(by_size)
  means = np.array([np.mean(x) for x in by_size.values()])
  errors = np.array([stats.sem(x) for x in by_size.values()])
  rng = np.random.default_rng(0)
  degrees = len(next(iter(by_size.values()))) - 1
  moved = means + errors * rng.standard_t(degrees, (CURVES, len(sizes)))
  last = [points[-1] for x in moved if (points := crossings(sizes, x))]
  share = len(last) / CURVES
  points = crossings(sizes, means)
  best = f"{points[-1]:,.0f}" if points else "none"
  if not last:
    return best
  low, high = np.quantile(last, (0.025, 0.975))
  return f"{best} ({low:,.0f} to {high:,.0f} in {share:.0%} of the draws)"


def markdown(study: Path = STUDY, limiting: Path = LIMITING) -> str:
  """The three tables."""
  scores, others = read(study), read(limiting)
  sizes = list(scores["vera"])
  header = ["method", *(f"{size:,}" for size in sizes)]
  curves, against = [], []
  for name, by_size in scores.items():
    parts = [interval(by_size[size]) for size in sizes]
    curves.append([NAMES[name], *(f"{m:.1f} ± {h:.1f}" for m, h in parts)])
    if name != "vera":
      apart = differences(scores, name)
      parts = [interval(apart[size]) for size in sizes]
      cells = [f"{m:+.1f} ± {h:.1f}" for m, h in parts]
      against.append([NAMES[name], *cells, crossing(apart)])
  return "\n\n".join(
    [
      markdown_table(header, curves),
      markdown_table([*header, "crosses VeRA at"], against),
      limits(scores, others),
    ]
  )


def limits(scores: Scores, others: Scores) -> str:
  """The largest size alone: VeRA and what may limit it, beside LoRA r = 8."""
  size = max(scores["vera"])
  rows = []
  for name, by_size in {**scores, **others}.items():
    mean, half = interval(by_size[size])
    cells = [{**NAMES, **DRAWN}[name], f"{mean:.1f} ± {half:.1f}"]
    for reference in ("vera", "lora 8"):
      pairs = zip(by_size[size], scores[reference][size], strict=True)
      mean, half = interval([a - b for a, b in pairs])
      cells.append("" if name == reference else f"{mean:+.1f} ± {half:.1f}")
    rows.append(cells)
  header = [
    f"{size:,} sentences",
    "accuracy (%)",
    "over VeRA",
    "over LoRA, r = 8",
  ]
  return markdown_table(header, rows)


def figure(scores: Scores) -> Figure:
  """A line per method, through the means; bars over the seeds' range."""
  with mpl.rc_context(STYLE):
    title = "SST-2 on MiniLM, 512 steps of 8 sentences each"
    made, (ax,) = grid([3.4], width=None, least=5.0, title=title)
    for number, (name, by_size) in enumerate(scores.items()):
      color, marker = METHOD_COLORS[name.split()[0]]
      means = np.array([np.mean(x) for x in by_size.values()])
      ends = np.array([(min(x), max(x)) for x in by_size.values()]).T
      ax.errorbar(
        np.array(list(by_size)) * 1.04 ** (number - 2),  # no bar hides another
        means,
        yerr=np.abs(ends - means),
        label=NAMES[name],
        color=color,
        marker=marker,
        markerfacecolor="white" if name == "lora 1" else color,
        capsize=2,
      )
    ax.set(xscale="log", xlabel="training sentences", ylabel="accuracy (%)")
    ax.set_xticks(sizes := list(scores["vera"]), [f"{n:,}" for n in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(loc="lower right")
  return made


def main(words: list[str]) -> None:
  if len(words) != 3:
    raise UserError("Name the study's folder, its limits', and the figure's.")
  study, limiting, out = map(Path, words)
  print(markdown(study, limiting))
  print(*save(figure(read(study)), out, "data_curve", ["png"]))


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
