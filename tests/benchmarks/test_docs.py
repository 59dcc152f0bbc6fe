"""README.md and the pages of docs/ hold what results/ says."""

import re
import warnings
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from benchmarks import docs
from vera_jax.report.frame import load_sweep
from vera_jax.report.summary import BY, paired

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# "6.5 points above it (95 % interval: 4.6 to 8.4)" in a sentence
STATED = re.compile(
  r"(\d+\.\d)[^().;|]{0,40}\((?:95 % interval:? )?"
  r"(\d+\.\d|level)[^().;]{0,14} to (\d+\.\d|level)\b[^()]{0,40}\)"
)
SOURCE = re.compile(r"(?:from |\()(?:\.\./)?(results/[\w/]+)")
FIGURE_OF = re.compile(r"figures/(\w+)-\w+\.png")


load = cache(load_sweep)  # several tests read the same


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_up_to_date(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(docs, "load_sweep", load)
  page = path.read_text(encoding="utf-8")
  assert docs.filled(page) == page
  assert "<!-- from" not in docs.MADE.sub("", page)  # each has its end
  for match in docs.FIGURE.finditer(page):
    figure = f"{match['sweep']}-{match['name']}.png"
    assert (ROOT / "docs/figures" / figure).exists()


@cache
def scores(source):
  """A sweep's scores, a row per condition and a column per seed.

  Where draws of matrices are compared also their means over the ranks.
  """
  runs = load(Path(source)).runs
  rows = runs.pivot_table(index=BY, columns="seed", values="score")
  if "initialiser" in source:
    inits = runs["condition"].str.extract(r"init (\w+)")[0]
    means = runs.pivot_table(index=inits, columns="seed", values="score")
    return np.vstack([rows, means])
  return rows.to_numpy()


def shows(shown, value):
  """Whether a text with one decimal may stand for values; ties go both ways."""
  number = float(shown.replace("level", "0.0"))
  return abs(number - np.abs(value)) < 0.05 + 1e-9


def is_found(stated, source):
  """Whether a sweep has this median and range, or difference and interval."""
  middle, *ends = stated
  rows = scores(source)
  found = [
    (np.nanmin(row), np.nanmax(row))
    for row in rows
    if shows(middle, np.nanmedian(row))
  ]
  with warnings.catch_warnings(action="ignore"):  # of no seed in common
    apart = np.nanmean(rows[:, None] - rows, axis=-1)
  for pair in np.argwhere(np.triu(shows(middle, apart), 1)):
    both = rows[pair][:, ~np.isnan(rows[pair]).any(axis=0)]
    seeds = (dict(enumerate(row)) for row in both)
    difference = paired(*seeds)
    found.append((difference["ci_low"], difference["ci_high"]))
  return any(
    shows(ends[0], low) and shows(ends[1], high)
    for both in found
    for low, high in permutations(both)
  )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_sentences_say_what_results_say(path, monkeypatch):
  """A number with its interval is one of the sweeps that the page names."""
  monkeypatch.chdir(ROOT)

  def sources(page):
    named = {*SOURCE.findall(page)}
    named |= {f"results/sweeps/{name}" for name in FIGURE_OF.findall(page)}
    sweeps = {x.rstrip("/") for x in named if x.startswith("results/sweeps/")}
    return {x for x in sweeps if Path(x).is_dir()}

  page = path.read_text(encoding="utf-8")
  named = sources(page)
  if path.stem in ("README", "when"):  # they sum up what other pages have
    for other in PAGES[1:]:
      if f"({other.name}" in page or f"(docs/{other.name}" in page:
        named |= sources(other.read_text(encoding="utf-8"))
  prose = docs.MADE.sub("", page)
  prose = " ".join(x for x in prose.splitlines() if not x.startswith("|"))
  for match in STATED.finditer(prose):
    assert any(is_found(match.groups(), s) for s in sorted(named)), match[0]


def test_what_stands_between_the_marks_is_made_anew(monkeypatch):
  monkeypatch.chdir(ROOT)
  source = "results/sweeps/example"
  page = f"Before.\n<!-- from {source} -->\nold\n<!-- end -->\nAfter.\n"
  made = docs.filled(page)
  assert "old" not in made and "| sst2 |" in made
  assert made.startswith("Before.\n<!-- from") and made.endswith("\nAfter.\n")
  assert docs.filled(made) == made
