"""Puts what results/ holds into README.md and the pages of docs/.

  python -m benchmarks.docs

What stands in a page between `<!-- from PATH -->` and `<!-- end -->` is made
anew: of a file in results/plans its table, of a sweep's folder the report. The
figures that a page shows as figures/SWEEP-NAME.png are drawn.
"""

import re
from pathlib import Path

from benchmarks.plans import equality
from benchmarks.plans import report as plans
from experiments import cli
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.report import plots, tables
from vera_jax.report.frame import load_sweep
from vera_jax.report.summary import in_order, summary

DOCS, SWEEPS = Path("docs"), Path("results/sweeps")
MADE = re.compile(r"<!-- from (\S+) -->\n.*?<!-- end -->", re.DOTALL)
FIGURE = re.compile(
  r"\]\((?:docs/)?figures/(?P<sweep>\w+)-(?P<name>\w+)\.png\)"
)


def main() -> None:
  if not DOCS.is_dir():
    raise UserError("There is no docs/ here: run it at the checkout's top.")
  for path in [Path("README.md"), *sorted(DOCS.glob("*.md"))]:
    page = path.read_text(encoding="utf-8")
    path.write_text(filled(page), encoding="utf-8")
    draw(page)


def filled(page: str) -> str:
  """The page with what its marks ask for between them."""
  return MADE.sub(
    lambda match: (
      f"<!-- from {match[1]} -->\n\n{made_from(Path(match[1]))}\n\n<!-- end -->"
    ),
    page,
  )


def made_from(source: Path) -> str:
  """Markdown of a plan's file, of meshes.json, or of a sweep's folder.

  Raises:
    UserError: it is missing, or is none of these.
  """
  if source.is_dir():
    sweep = load_sweep(source)
    table = in_order(summary(sweep))
    below = tables.notes(sweep, table)
    return tables.text_of(tables.columns(table, sweep.paper), below).strip()
  if source.name == "meshes.json":
    return equality.markdown(read_json(source))
  return plans.markdown(read_json(source))


def draw(page: str) -> None:
  """The figures that a page shows."""
  shown: dict[str, set[str]] = {}
  for match in FIGURE.finditer(page):
    shown.setdefault(match["sweep"], set()).add(match["name"])
  for name, wanted in shown.items():
    sweep = load_sweep(SWEEPS / name)
    made = dict(plots.figures(sweep, in_order(summary(sweep))))
    if missing := sorted(wanted - set(made)):
      raise UserError(
        f"{SWEEPS / name} gives no figure {', '.join(missing)};"
        f" it gives {', '.join(made)}."
      )
    for one in sorted(wanted):
      plots.save(made[one], DOCS / "figures", f"{name}-{one}", ["png"])


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
