"""The documentation site: what docs/hooks.py makes of pages and notebooks, and
the links of the README, which is no page of it. `make check` builds the site,
and there a link, an anchor or a page out of the navigation fails the build."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from markdown import Markdown
from pymdownx.slugs import slugify

import vera_jax
import vera_jax.nnx
import vera_jax.peft_io
import vera_jax.report

ROOT = Path(__file__).resolve().parents[1]
HUB = "https://github.com/someone/vera_jax"
pytestmark = pytest.mark.skipif(
  not (ROOT / "docs/hooks.py").exists(), reason="not in a checkout"
)


@pytest.fixture(scope="module")
def hooks():
  spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def anchors(page):
  """Of a page's headings, as GitHub and the site make them."""
  text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
  make = slugify(case="lower")
  titles = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
  return {make(title.replace("`", ""), "-") for title in titles}


def test_the_readmes_links_lead_somewhere(hooks):
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  links = [m["to"] for m in hooks.LINK.finditer(readme)]
  assert len(links) > 20
  for link in links:
    if link.startswith("http"):
      continue
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists(), link
    if anchor:
      page = (ROOT / path).read_text(encoding="utf-8")
      assert anchor in anchors(page), link


@pytest.mark.parametrize(
  "link, source, page, where",
  [
    ("peft.md#a", "docs/gguf.md", "gguf.md", "peft.md#a"),
    ("#a", "docs/gguf.md", "gguf.md", "#a"),
    ("https://a.b/c", "docs/gguf.md", "gguf.md", "https://a.b/c"),
    ("docs/peft.md", "CONTRIBUTING.md", "contributing.md", "peft.md"),
    ("../CONTRIBUTING.md", "docs/peft.md", "peft.md", "contributing.md"),
    (
      "../docs/peft.md",
      "notebooks/writing.ipynb",
      "notebooks/writing.md",
      "../peft.md",
    ),
    (
      "../notebooks/writing.ipynb",
      "docs/language.md",
      "language.md",
      "notebooks/writing.md",
    ),
    ("../configs", "docs/a.md", "a.md", f"{HUB}/tree/main/configs"),
    ("../LICENSE", "docs/a.md", "a.md", f"{HUB}/blob/main/LICENSE"),
    ("nowhere.md", "docs/a.md", "a.md", None),
  ],
)
def test_links_lead_to_pages_or_to_the_repository(
  link, source, page, where, hooks
):
  assert hooks.target(link, source, page, HUB) == where


def test_without_an_address_files_are_named_and_not_linked(hooks):
  assert hooks.target("../LICENSE", "docs/a.md", "a.md", "") == ""


def test_a_notebook_is_a_page(hooks):
  source = "notebooks/first_steps.ipynb"
  notebook = json.loads((ROOT / source).read_text(encoding="utf-8"))
  page = hooks.notebook_page(notebook, source, HUB)
  assert page.startswith("# First steps\n")
  colab = "https://colab.research.google.com/github/someone/vera_jax/blob/main"
  assert f"({colab}/{source})" in page and "```python\nimport sys" in page
  assert "colab." not in hooks.notebook_page(notebook, source, "")


def test_mathematics_is_drawn_by_the_browser(hooks):
  text = "Of $`b`$ and `$x$`:\n\n```math\nB\\,d\n```\n\n```\n$`x`$\n```\n"
  page = Markdown(
    extensions=["pymdownx.superfences", hooks.Mathematics()]
  ).convert(text)
  assert page.count("<math") == 2 and 'display="block"' in page
  assert "<code>$x$</code>" in page and "$`x`$" in page


@pytest.mark.parametrize(
  "html, hosts",
  [
    ('<a href="https://a.b">', []),
    ('<link rel="canonical" href="https://a.b">', []),
    ('<img src="figures/a.png"><script src="a.js">', []),
    ('<script src="https://a.b/c.js">', ["script https://a.b/c.js"]),
    ('<link rel="stylesheet" href="//a.b">', ["link //a.b"]),
  ],
)
def test_what_a_page_loads_is_the_sites(html, hosts, hooks):
  loads = hooks.Loads()
  loads.feed(html)
  assert loads.hosts == hosts


def test_the_reference_has_every_public_name():
  pages = [x.read_text() for x in sorted((ROOT / "docs/api").glob("*.md"))]
  names = re.findall("^::: (.+)", "".join(pages), flags=re.MULTILINE)
  named = {name.rpartition(".")[2] for name in names}
  assert len(names) == len({*names})
  for package in (vera_jax, vera_jax.nnx, vera_jax.peft_io, vera_jax.report):
    # methods are in a table of methods.md
    public = {*package.__all__} - {*vera_jax.METHODS, "__version__"}
    assert public <= named, package


def test_every_page_says_for_whom_it_is():
  pages = sorted((ROOT / "docs").rglob("*.md"))
  assert len(pages) > 30
  for path in [ROOT / "CONTRIBUTING.md", *pages]:
    page = path.read_text(encoding="utf-8")
    first = page.split("\n\n")[1]
    assert first.startswith(("For those ", "For everyone ")), path
