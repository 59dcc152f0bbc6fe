"""The tables of docs/initialisation.md, made from the code and the results.

`benchmarks.docs` writes them: what the matrices are, and what the studies of
configs/sweeps/initialisers.py found.
"""

from pathlib import Path
from statistics import median
from typing import NamedTuple

from experiments.markdown import markdown_table
from vera_jax.adapters.projections import INITIALISERS
from vera_jax.report.frame import load_sweep
from vera_jax.report.summary import paired

STUDY = Path("results/sweeps/initialisers")
DRAWS = Path("results/sweeps/initialiser_draws")
FIRST = "kaiming_uniform"  # the paper's, which the others are compared with


class Described(NamedTuple):
  """What the code doesn't say of an initialiser.

  Attributes:
    entries: how an entry of a matrix of fan-in f is drawn.
    variance: of an entry.
    made_of: what defines it beside the seed, which is all that a file has.
    same_bits: whether a seed gives the same bits on any device.
  """

  entries: str
  variance: str
  made_of: str
  same_bits: str = "yes"


DENSE = "A and B, 4 bytes per entry"
ROWS = {
  "kaiming_uniform": Described(
    "uniform in ±√(6 / f); the paper's", "2 / f", DENSE
  ),
  "kaiming_normal": Described("normal", "2 / f", DENSE, "no"),
  "uniform": Described("uniform in 0 to 0.1; of Table 6", "1 / 1200", DENSE),
  "orthogonal": Described(
    "orthogonal rows, or columns where there are more rows; scaled",
    "2 / f",
    DENSE,
    "no",
  ),
  "rademacher": Described("±√(2 / f), by a bit", "2 / f", DENSE),
  "sparse_third": Described("±√(6 / f) for one in 3, else 0", "2 / f", DENSE),
  "sparse_root": Described(
    "±√(2 √f / f) for one in √f, else 0", "2 / f", DENSE
  ),
  "ones": Described("1; with r = 1, 1LoRA", "0", DENSE),
  "structured": Described(
    "signed sums of a signed orthogonal transform; below",
    "2 / f",
    "2 bytes per input and output, for each width; r of them if that is more",
  ),
  "peft": Described("PEFT's own, as torch draws them", "2 / f", DENSE),
}
HEADER = (
  *("`config.vera.init`", "an entry", "its variance"),
  *("in memory", "same bits everywhere"),
)


def markdown() -> str:
  """What each initialiser is."""
  rows = [(f"`{name}`", *ROWS[name]) for name in INITIALISERS]
  return markdown_table(HEADER, rows, texts=len(HEADER))


def scores(study: Path = STUDY) -> str:
  """A study's table, and where each matrix has one draw its figure, which
  `benchmarks.docs` draws."""
  sweep = load_sweep(study)
  runs = sweep.runs.assign(
    init=[run["config"]["vera"]["init"] for run in sweep.runs["result"]]
  )
  by_matrix = {
    key: dict(zip(group["seed"], group["score"], strict=True))
    for key, group in runs.groupby(["rank", "init"], sort=False)
  }
  rate = runs.groupby("init")["rate"].first()
  ranks = sorted({rank for rank, _ in by_matrix})
  rows = []
  for init in sorted({init for _, init in by_matrix}, key=INITIALISERS.index):
    cells = [f"`{init}`", f"{rate[init]:g}"]
    for rank in ranks:
      by_seed = by_matrix.get((rank, init))
      if by_seed is None:
        cells += ["", ""]
        continue
      values = sorted(by_seed.values())
      cells.append(
        f"{median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"
      )
      beside = paired(by_seed, by_matrix.get((rank, FIRST), {}))
      interval = f"{beside['ci_low']:+.1f} to {beside['ci_high']:+.1f}"
      other = init != FIRST and beside["pairs"] > 0
      cells.append(f"{beside['difference']:+.1f} ({interval})" if other else "")
    rows.append(cells)
  header = ["matrix", "rate"]
  for rank in ranks:
    header += [f"r = {int(rank)}: median (range)", "beside Kaiming uniform"]
  draws = {run["config"]["vera"]["projection_seed"] for run in runs["result"]}
  drawn = "each with a draw of its own of every matrix"
  figure = ""  # it would have a line for each draw
  if len(draws) == 1:
    drawn = "with one draw of each matrix"
    figure = f"![Scores by matrix and rank](figures/{study.name}-scores.png)"
  about = (
    f"{sweep.title}: every score is of the best epoch in percent, over"
    f" {len(set(runs['seed']))} seeds, {drawn}; the differences are means over"
    " the same seeds, with 95 % intervals that are not corrected for their"
    " number."
  )
  scored = markdown_table(header, rows, texts=len(header))
  return "\n\n".join(filter(None, [about, scored, figure]))
