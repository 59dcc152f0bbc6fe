"""README.md and the pages of docs/ hold what results/ says."""

from pathlib import Path

import pytest

from benchmarks import docs
from vera_jax.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_up_to_date(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  page = path.read_text(encoding="utf-8")
  assert docs.filled(page) == page
  assert "<!-- from" not in docs.MADE.sub("", page)  # each has its end
  for match in docs.FIGURE.finditer(page):
    figure = f"{match['sweep']}-{match['name']}.png"
    assert (ROOT / "docs/figures" / figure).exists()


def test_what_stands_between_the_marks_is_made_anew(monkeypatch):
  monkeypatch.chdir(ROOT)
  source = "results/sweeps/example"
  page = f"Before.\n<!-- from {source} -->\nold\n<!-- end -->\nAfter.\n"
  made = docs.filled(page)
  assert "old" not in made and "| sst2 |" in made
  assert made.startswith("Before.\n<!-- from") and made.endswith("\nAfter.\n")
  assert docs.filled(made) == made


def test_figures_that_a_page_shows_are_drawn(monkeypatch, tmp_path):
  monkeypatch.setattr(docs, "DOCS", tmp_path)
  monkeypatch.setattr(docs, "SWEEPS", ROOT / "results/sweeps")
  docs.draw("![Curves](figures/example-curves.png)")
  drawn = [path.name for path in (tmp_path / "figures").iterdir()]
  assert drawn == ["example-curves.png"]
  with pytest.raises(UserError, match=r"no figure pie; it gives .*curves"):
    docs.draw("![Pie](figures/example-pie.png)")


def test_elsewhere_than_in_a_checkout(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="checkout"):
    docs.main()
