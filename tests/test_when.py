"""docs/when.md: each sentence has a link to what carries it, and links lead
somewhere."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "when.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
MOST_WORDS = 700

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")


def sentences(page: str) -> list[str]:
  """Those of paragraphs and list items, and the rows of tables."""
  page = re.sub(r"^\|.*\n\| ---.*$", "", page, flags=re.MULTILINE)  # headers
  parts = []
  for block in re.split(r"\n\n|\n(?=- |\|)", page):
    text = " ".join(block.split()).removeprefix("- ")
    if text and not text.startswith("#"):
      text = re.sub(r"^\*\*[^*]+\.\*\* ", "", text)  # what an item is about
      parts += re.split(r"(?<=[.!?]) (?=[A-Z`])", text)
  return parts


def anchors(page: str) -> set[str]:
  """The names that a page's headings have as anchors."""
  headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
  bare = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
  return {heading.replace(" ", "-") for heading in bare}


def lacking(page: str) -> list[str]:
  """Sentences without a link, but for the one that says for whom it is."""
  return [
    text
    for text in sentences(page)
    if not LINK.search(text) and not text.startswith("For those ")
  ]


def dead(page: str) -> list[str]:
  """Links to a file or heading that isn't there."""
  targets = [target.partition("#") for _, target in LINK.findall(page)]
  return [
    name + sharp + anchor
    for name, sharp, anchor in targets
    if not (DOCS / name).is_file()
    or (sharp and anchor not in anchors((DOCS / name).read_text("utf-8")))
  ]


def test_each_sentence_has_a_link_that_leads_somewhere():
  page = PAGE.read_text("utf-8")
  assert len(sentences(page)) > 30
  assert not lacking(page)
  assert not dead(page)
  words = LINK.sub(r"\1", page).replace("|", " ").split()
  assert len(words) <= MOST_WORDS


def test_a_sentence_without_a_link_and_a_dead_link_are_noticed():
  page = "# A\n\nIt is [so](results.md#no). It is not\nso.\n\n- [x](no.md) y.\n"
  assert lacking(page) == ["It is not so."]
  assert dead(page) == ["results.md#no", "no.md"]
