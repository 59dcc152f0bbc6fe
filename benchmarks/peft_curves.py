"""The figure of `peft_steps`, which benchmarks.docs draws from its results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from vera_jax.report import style
from vera_jax.report.frame import method_title


def draw(curves: Mapping[str, Mapping[str, Any]], path: Path) -> None:
  """Both loss curves of each method, one on the other."""
  with mpl.rc_context(style.STYLE):
    figure, axes = style.grid([2.4] * len(curves), width=None, least=3.0)
    for axis, (method, curve) in zip(axes, curves.items(), strict=True):
      color, _ = style.look(method)
      axis.plot(curve["peft"], color="#c8c8c8", linewidth=4, label="PEFT")
      axis.plot(curve["vera_jax"], color=color, linewidth=1, label="vera_jax")
      apart = curve["largest_relative_loss_difference"]
      axis.set(
        title=f"{method_title(method)}: relative difference up to {apart:.1e}",
        xlabel="step",
        ylabel="training loss",
      )
      axis.legend(loc="lower left")
  style.save(figure, path.parent, path.stem, ["png"])
