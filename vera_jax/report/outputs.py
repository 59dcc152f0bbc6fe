"""What several runs wrote for the same test inputs, side by side."""

import difflib
from statistics import fmean

from vera_jax.data.written import Written, read_written
from vera_jax.errors import UserError
from vera_jax.report.frame import UNTUNED, Sweep, method_title

FIRST, EXTREME = 2, 2  # inputs from the beginning, and from either end


def side_by_side(sweep: Sweep) -> str:
  """A page in Markdown; "" where no run has its texts beside its result.

  Of each condition the run with the lowest seed is shown, on inputs that all of
  them have: the first ones, and those on which the tuned runs agree least and
  most with the references.
  """
  shown: dict[str, Written] = {}
  tuned = []
  for _, run in sweep.runs.sort_values("seed", kind="stable").iterrows():
    name = method_title(run["method"])
    name += f", {run['condition']}" if run["condition"] else ""
    if name in shown or run["folder"] is None:
      continue
    try:
      shown[name] = read_written(run["folder"])
    except (UserError, ValueError):
      continue
    if run["method"] != UNTUNED:
      tuned.append(shown[name])
  if not shown:
    return ""
  one = next(iter(shown.values()))
  common = [
    text
    for text in one.outputs
    if all(text in other.outputs for other in shown.values())
  ]
  means = {
    text: fmean(
      agreement(run.outputs[text], run.references[text])
      for run in tuned or shown.values()
    )
    for text in common
  }
  ordered = sorted(common[FIRST:], key=means.__getitem__)
  extreme = min(EXTREME, len(ordered) // 2)
  parts = {
    "The first inputs": common[:FIRST],
    "The least agreement with the references": ordered[:extreme],
    "The most agreement with the references": ordered[len(ordered) - extreme :],
  }
  lines = [
    f"Of each condition the lowest seed's texts; the first {FIRST} inputs, and"
    f" of the others the {EXTREME} on which the tuned runs agree least and most"
    " with the references. Agreement is the share of words in common with the"
    " nearest reference, in the same order (2 × common / all, by Python's"
    " difflib), as the mean over these runs."
  ]
  for title, texts in parts.items():
    for text in texts:
      lines += ["", f"**{title}** ({means[text]:.2f}): `{text}`", ""]
      lines += ["| by | text |", "| --- | --- |"]
      said = {"the reference": one.references[text][0]}
      said |= {name: run.outputs[text] for name, run in shown.items()}
      lines += [
        f"| {_cell(name)} | {_cell(output) or '(nothing)'} |"
        for name, output in said.items()
      ]
  return "\n".join([*lines, ""])


def agreement(text: str, references: list[str]) -> float:
  """The share of words that a text and its nearest reference have in common."""
  words = text.lower().split()
  return max(
    difflib.SequenceMatcher(None, words, one.lower().split()).ratio()
    for one in references
  )


def _cell(text: str) -> str:
  return " ".join(text.split()).replace("|", "\\|")
