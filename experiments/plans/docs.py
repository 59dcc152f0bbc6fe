"""Puts the tables of results/plans into the docs pages.

python -m experiments.plans.docs
"""

from collections.abc import Iterable
from pathlib import Path

from experiments.plans import equality, report
from vera_jax.json_files import read_json

PLANS = Path("results/plans")
BEGIN, END = "<!-- tables: experiments/plans/docs.py -->", "<!-- end -->"


def between(page: str, tables: Iterable[str]) -> str:
  """The page with the tables, and nothing else, between its two marks."""
  before, _, rest = page.partition(BEGIN)
  _, _, after = rest.partition(END)
  return "\n\n".join([before + BEGIN, *tables, END + after])


def main() -> None:
  plans = [read_json(path) for path in sorted(PLANS.glob("roberta*.json"))]
  pages = {
    Path("docs/tpu_pod.md"): map(report.markdown, plans),
    Path("docs/meshes.md"): [
      equality.markdown(read_json(PLANS / "meshes.json"))
    ],
  }
  for path, tables in pages.items():
    path.write_text(between(path.read_text(), tables))


if __name__ == "__main__":
  main()
