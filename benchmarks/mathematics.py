"""The figures of docs/mathematics.md, from the library's own shapes and counts.

  python -m benchmarks.mathematics

Nothing is trained or timed: a drawing of the equation, the numbers that VeRA
and LoRA train, the size of what A and B make of an input, and the
multiply-adds of the three orders of multiplication.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments import cli
from vera_jax.adapters.interface import LowRank
from vera_jax.adapters.plans import costs
from vera_jax.adapters.projections import make_pair
from vera_jax.report.style import BLACK, METHOD_COLORS, STYLE, save

FOLDER = Path("docs/figures/mathematics")
WIDTH = 6.75  # inches of a page's text
GREY = "#D0D0D0"  # what is frozen
VERA, LORA = METHOD_COLORS["vera"], METHOD_COLORS["lora"]
RANKS = 4 ** np.arange(6)  # 1 to 1024
# (inputs, outputs) of the adapted layers: query and value of 12 layers; all
# linear layers of 32 but the head.
NETWORKS = {
  "RoBERTa-base, query and value": [(768, 768)] * 24,
  "Llama 2 7B, all linear layers": 32
  * [*[(4096, 4096)] * 4, *[(4096, 11008)] * 2, (11008, 4096)],
}
PLANS = {"factored": "-", "folded_forward": "--", "folded": ":"}


def vera_count(layers: Sequence[tuple[int, int]], rank: int) -> int:
  return sum(rank + outputs for _, outputs in layers)


def lora_count(layers: Sequence[tuple[int, int]], rank: int) -> int:
  return sum(rank * (inputs + outputs) for inputs, outputs in layers)


@cache
def factors(rank: int, lora: bool) -> LowRank:
  """Of one layer of width 768; only shapes are looked at."""
  down, up = jnp.zeros((768, rank)), jnp.zeros((rank, 768))
  if lora:
    return LowRank(down, up, trains_down=True, trains_up=True)
  return LowRank(down, up, inner=up[:, 0], outer=down[:, 0])


def step_costs(
  tokens: int, rank: int, *, lora: bool = False
) -> dict[str, float]:
  """Multiply-adds of a training step on that layer, by plan."""
  return costs(tokens, factors(rank, lora))


def cheapest(rank: int, most: int = 2**14) -> list[tuple[int, str]]:
  """The fewest tokens from which each plan is the cheapest for VeRA."""
  first: dict[str, int] = {}
  for tokens in range(1, most):
    priced = step_costs(tokens, rank)
    first.setdefault(min(priced, key=lambda plan: priced[plan]), tokens)
  return sorted((tokens, plan) for plan, tokens in first.items())


def output_scale(rank: int, init: str, *, width: int = 768) -> float:
  """The deviation of B (d * (A x)), where d is 0.1 and that of x is 1."""
  pair = make_pair(rank, width, width, init=init)
  A, B = (np.asarray(pair[name]) for name in "AB")
  x = np.random.default_rng(1).standard_normal((64, width))
  return float(np.std(0.1 * (x @ A.T) @ B.T))


def equation_figure() -> Figure:
  """Two layers: by LoRA with matrices of their own, by VeRA with one pair."""
  figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
  panels = zip(figure.subplots(1, 2), ("LoRA", "VeRA"), strict=True)
  for ax, method in panels:
    ax.set(xlim=(0, 12), ylim=(0, 7), title=method)
    ax.axis("off")
    color = METHOD_COLORS[method.lower()][0]
    if method == "VeRA":  # one pair, through which both layers go
      _box(ax, (1.8, 0.2), (1.7, 6.6), "$A$", GREY)
      _box(ax, (5.2, 0.2), (1.4, 6.6), "$B$", GREY)
    for y, layer in ((5.0, 1), (2.0, 2)):
      ax.annotate(
        "",
        (8.9, y),
        (0.9, y),
        arrowprops={"arrowstyle": "-|>", "lw": 0.8, "fc": BLACK},
        zorder=0,
      )
      ax.text(0.5, y, f"$x_{layer}$", ha="center", va="center")
      ax.text(9.1, y, f"$+\\ W_{layer}\\, x_{layer}$", va="center")
      if method == "LoRA":
        _box(ax, (2.2, y - 0.3), (1.9, 0.6), f"$A_{layer}$", color)
        _box(ax, (5.4, y - 0.95), (0.6, 1.9), f"$B_{layer}$", color)
      else:
        _box(ax, (4.1, y - 1.1), (0.5, 2.2), f"$d_{layer}$", color)
        _box(ax, (7.3, y - 0.95), (0.5, 1.9), f"$b_{layer}$", color)
  return figure


def _box(
  ax: Axes,
  corner: tuple[float, float],
  size: tuple[float, float],
  text: str,
  color: str,
) -> None:
  ax.add_patch(Rectangle(corner, *size, fc=color, ec=BLACK, lw=0.6, zorder=2))
  ax.text(
    corner[0] + size[0] / 2,
    corner[1] + size[1] / 2,
    text,
    ha="center",
    va="center",
    zorder=3,
    color=BLACK if color == GREY else "white",
  )


def count_figure() -> Figure:
  figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
  axes = figure.subplots(1, len(NETWORKS))
  for ax, (title, layers) in zip(axes, NETWORKS.items(), strict=True):
    for name, (color, marker), count in (
      ("LoRA", LORA, lora_count),
      ("VeRA", VERA, vera_count),
    ):
      numbers = [count(layers, int(rank)) for rank in RANKS]
      ax.loglog(RANKS, numbers, marker=marker, color=color, label=name, base=2)
    ax.set(title=title, xlabel="rank r", ylabel="trained numbers")
    ax.set_yscale("log", base=10)
    ax.set_xticks(RANKS, [f"{rank}" for rank in RANKS])
  axes[0].legend()
  return figure


def scale_figure() -> Figure:
  figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
  ax = figure.subplots()
  for init, dash in (("kaiming_uniform", "-"), ("uniform", ":")):
    values = [output_scale(int(rank), init) for rank in RANKS]
    label = f"A and B drawn by {init}"
    ax.loglog(RANKS, values, f"{dash}o", color=VERA[0], label=label)
  ax.set(xlabel="rank r", ylabel="deviation of B (d ⊙ (A x))")
  ax.set_xscale("log", base=2)
  ax.set_xticks(RANKS, [f"{rank}" for rank in RANKS])
  ax.legend()
  return figure


def order_figure() -> Figure:
  figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
  tokens = np.unique(np.geomspace(16, 8192, 60).astype(int))
  panels = (
    ("VeRA, r = 256", 256, False, VERA[0]),
    ("VeRA, r = 1024", 1024, False, VERA[0]),
    ("LoRA, r = 8", 8, True, LORA[0]),
  )
  axes = figure.subplots(1, len(panels), sharey=True)
  for ax, (title, rank, lora, color) in zip(axes, panels, strict=True):
    priced = [step_costs(int(t), rank, lora=lora) for t in tokens]
    frozen = 2 * tokens * 768 * 768  # x W0 and its input gradient
    for plan, dash in PLANS.items():
      if plan in priced[0]:
        shares = np.array([row[plan] for row in priced]) / frozen
        ax.loglog(tokens, shares, dash, color=color, label=plan)
    ax.set(title=title, xlabel="tokens per step")
    ax.legend()
  axes[0].set_ylabel("multiply-adds, as a multiple\nof the frozen layer's")
  return figure


def main() -> None:
  with mpl.rc_context(STYLE):
    for name, figure in (
      ("equation", equation_figure()),
      ("counts", count_figure()),
      ("scale", scale_figure()),
      ("orders", order_figure()),
    ):
      save(figure, FOLDER, name, ("png",))


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
