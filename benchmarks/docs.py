"""Puts the tables of results/ into README.md and the pages of docs/.

  python -m benchmarks.docs

What a page has between `<!-- from PATH -->` and `<!-- end -->` is replaced: by
a table where PATH is a file in results/plans, or a folder in its folder scale;
by the report where it is a sweep's folder (of the initialisers' studies by a
shorter one, and by a row per method where the mark says `from PATH in brief`),
by the tables that it makes where it is benchmarks/methods.py,
benchmarks/initialisers.py or benchmarks/data_curve.py,
by what is below its title where it is a page, such as the report's outputs.md.
The figures that a page shows as figures/SWEEP-NAME.png are drawn, those of
results/peft_steps, and that of a step's growth.
"""

import re
from pathlib import Path

import pandas as pd

from benchmarks import (
  data_curve,
  decode,
  initialisers,
  loading,
  matrices,
  meshes,
  methods,
  others,
  peft_curves,
  serving_figure,
  step_growth,
)
from experiments import cli
from experiments.plans import report as plans
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.report import plots, tables
from vera_jax.report.frame import load_sweep, method_title
from vera_jax.report.summary import summary

DOCS, SWEEPS = Path("docs"), Path("results/sweeps")
SCALE = Path("results/plans/scale")
SERVING = Path("results/benchmarks/serving")
GROWTH = Path("results/benchmarks/step_growth.json")
MADE = re.compile(
  r"<!-- from (\S+)( in brief)? -->\n.*?<!-- end -->", re.DOTALL
)
FIGURE = re.compile(
  r"\]\((?:docs/)?figures/(?P<sweep>\w+)-(?P<name>\w+)\.png\)"
)
STEPS = re.compile(r"\]\(\.\./(results/peft_steps/[\w-]+)\.png\)")


def main() -> None:
  if not DOCS.is_dir():
    raise UserError("There is no docs/ here: run it at the top of a checkout.")
  for path in [Path("README.md"), *sorted(DOCS.glob("*.md"))]:
    page = filled(path.read_text(encoding="utf-8"))
    path.write_text(page, encoding="utf-8")
    draw(page)


def filled(page: str) -> str:
  """The page with every marked table made anew.

  Raises:
    UserError: the file that a mark names is missing, or is no result.
  """

  def between(match: re.Match[str]) -> str:
    source = Path(match[1])
    if source in (initialisers.STUDY, initialisers.DRAWS):
      made = initialisers.scores(source)
    elif match[2]:
      made = brief(tables.columns(summary(load_sweep(source))))
    elif SCALE in source.parents:
      made = plans.at_scale(map(read_json, sorted(source.rglob("*.json"))))
    elif source == SERVING:
      made = serving_figure.markdown(source)
    elif source.is_dir():
      sweep = load_sweep(source)
      made = tables.page(sweep, summary(sweep)).strip()
    elif source.suffix == ".md":
      made = source.read_text(encoding="utf-8").partition("\n\n")[2].strip()
    elif source.name == "methods.py":
      made = (
        methods.markdown()
        if "benchmarks" in source.parts
        else methods.settings()
      )
    elif source.name == "initialisers.py":
      made = initialisers.markdown()
    elif source.name == "data_curve.py":
      made = data_curve.markdown()
    elif source.name.startswith("matrices-"):
      made = matrices.markdown(read_json(source))
    elif source.name == "meshes.json":
      made = meshes.markdown(read_json(source))
    elif source.name == "loading.json":
      made = loading.markdown(read_json(source))
    elif source.name == "others.json":
      made = others.markdown(read_json(source))
    elif source == GROWTH:
      made = step_growth.markdown(read_json(source))
    elif source.name.startswith("decode-"):
      made = decode.markdown(read_json(source)).strip()
    else:
      made = plans.markdown(read_json(source))
    mark = f"<!-- from {match[1]}{match[2] or ''} -->"
    return f"{mark}\n\n{made}\n\n<!-- end -->"

  return MADE.sub(between, page)


def brief(cells: pd.DataFrame) -> str:
  """A study of one task: a row per method, and its distance from LoRA."""
  rows = pd.DataFrame(
    {
      "method": cells["method"].map(method_title),
      "trained numbers": cells["adapter parameters"],
      "median (range)": cells["median at best epoch (range)"],
      "difference from LoRA (95 % interval)": cells[
        "difference from LoRA (95 % interval)"
      ],
    }
  )
  return tables.markdown(rows)


def draw(page: str) -> None:
  """Draws the figures that a page shows.

  Raises:
    UserError: a sweep's results don't give such a figure.
  """
  for match in STEPS.finditer(page):
    peft_curves.draw(
      read_json(Path(f"{match[1]}.json")), Path(f"{match[1]}.png")
    )
  if f"figures/{GROWTH.stem}.png" in page:
    growth = step_growth.figure(read_json(GROWTH))
    plots.save(growth, DOCS / "figures", GROWTH.stem, ["png"])
  shown = {(match["sweep"], match["name"]) for match in FIGURE.finditer(page)}
  for name in sorted({sweep for sweep, _ in shown}):
    sweep = load_sweep(SWEEPS / name)
    made = dict(plots.figures(sweep, summary(sweep)))
    for one in sorted(figure for of, figure in shown if of == name):
      if one not in made:
        raise UserError(
          f"{SWEEPS / name} gives no figure {one}; it gives {', '.join(made)}."
        )
      plots.save(made[one], DOCS / "figures", f"{name}-{one}", ["png"])


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
