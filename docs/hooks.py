"""What `mkdocs build` does beside turning docs/ into pages.

Notebooks and the pages at the top of the repository become pages of the site,
links that leave docs/ lead to the repository, mathematics becomes MathML while
the site is built, and a page that would load anything from another host fails
the build.

In a page, mathematics is written as GitHub reads it: $`x`$ in a sentence, or a
fence of the language "math".
"""

import json
import logging
import re
from html.parser import HTMLParser
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger("mkdocs.hooks")

# Pages whose source lies beside docs/.
SOURCES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
SOURCES |= {
  f"notebooks/{path.stem}.md": f"notebooks/{path.name}"
  for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
PAGES = {source: page for page, source in SOURCES.items()}

FENCE = re.compile(r"^(`{3,}).*?^\1 *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<to>[^()\s]+)\)")
MATH_FENCE = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MATH = r"\$`([^`]+)`\$"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  config.markdown_extensions.append(Mathematics())
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages and pictures that lie beside docs/."""
  for page, source in SOURCES.items():
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith(".ipynb"):
      text = notebook_page(json.loads(text), source, config.repo_url or "")
      notebook = File.generated(config, source, abs_src_path=str(ROOT / source))
      files.append(notebook)  # to be downloaded
    files.append(File.generated(config, page, content=text))
  for path in sorted((ROOT / "results").rglob("*.png")):
    name = path.relative_to(ROOT).as_posix()
    files.append(File.generated(config, name, abs_src_path=str(path)))
  return files


def on_page_markdown(
  markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Turns the links of a source into links of the page that is made of it."""
  name = page.file.src_uri
  source = SOURCES.get(name, f"docs/{name}")

  def linked(match: re.Match[str]) -> str:
    to = target(match["to"], source, name, config.repo_url or "")
    if to is None:
      LOG.warning("%s links to %s, which is not there", source, match["to"])
    return f"{match['image']}[{match['text']}]({to})" if to else match["text"]

  texts, end = [], 0  # fences stay as they are
  for fence in FENCE.finditer(markdown):
    texts += [LINK.sub(linked, markdown[end : fence.start()]), fence[0]]
    end = fence.end()
  return "".join([*texts, LINK.sub(linked, markdown[end:])])


def target(to: str, source: str, page: str, repository: str) -> str | None:
  """Where a link of a source leads on the page made of it.

  Args:
    to: the link, relative to the source.
    source: the file that has it, from the top of the repository.
    page: the page made of it, from the top of the site.
    repository: its address, or "".

  Returns:
    The link; "" where the repository has the file and no address; None where
    there is no such file.
  """
  path, _, anchor = to.partition("#")
  if ":" in path or not path:
    return to
  file = normpath(PurePosixPath(source).parent / path)
  anchor = f"#{anchor}" if anchor else ""
  if not (ROOT / file).exists():
    return None
  if file.startswith("docs/"):
    file = file.removeprefix("docs/")
  elif file in PAGES:
    file = PAGES[file]
  elif not (file.startswith("results/") and file.endswith(".png")):
    kind = "tree" if (ROOT / file).is_dir() else "blob"
    return repository and f"{repository.rstrip('/')}/{kind}/main/{file}{anchor}"
  return relpath(file, PurePosixPath(page).parent) + anchor


def notebook_page(
  notebook: dict[str, Any], source: str, repository: str
) -> str:
  """A notebook's cells as Markdown, with the outputs that it was saved with."""
  name = PurePosixPath(source).name
  title, *cells = notebook["cells"]
  ways = [f"[download the notebook]({name}){{ download }}"]
  if "github.com/" in repository:
    where = repository.partition("github.com/")[2].strip("/")
    colab = "https://colab.research.google.com/github"
    ways.append(f"[open it in Colab]({colab}/{where}/blob/main/{source})")
  ways[0] = ways[0].replace("[d", "[D")
  parts = ["".join(title["source"]), ", or ".join(ways) + "."]
  for cell in cells:
    text = "".join(cell["source"])
    parts.append(
      text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
    )
    for output in cell.get("outputs", []):
      data = output.get("data", {})
      if "image/png" in data:
        picture = "".join(data["image/png"]).strip()
        parts.append(f'<img alt="" src="data:image/png;base64,{picture}">')
      elif "text/html" in data:
        parts.append("".join(data["text/html"]))
      elif shown := output.get("text") or data.get("text/plain"):
        parts.append(f"```text\n{''.join(shown).rstrip()}\n```")
  return "\n\n".join(parts) + "\n"


class Mathematics(Extension):
  """LaTeX to MathML, which browsers draw with the system's fonts."""

  def extendMarkdown(self, md: Markdown) -> None:
    # before fences (25) and code in backticks (190) are taken as such
    md.preprocessors.register(DisplayedMath(md), "displayed_math", 28)
    md.inlinePatterns.register(InlineMath(MATH, md), "inline_math", 200)


class DisplayedMath(Preprocessor):
  def run(self, lines: list[str]) -> list[str]:
    def as_html(match: re.Match[str]) -> str:
      drawn = convert(match[1], display="block")
      return self.md.htmlStash.store(f"<div>{drawn}</div>")

    return MATH_FENCE.sub(as_html, "\n".join(lines)).split("\n")


class InlineMath(InlineProcessor):
  def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
    return self.md.htmlStash.store(convert(m[1])), m.start(), m.end()


class Loads(HTMLParser):
  """Collects what a page loads from other hosts; links are not loaded."""

  def __init__(self) -> None:
    super().__init__()
    self.hosts: list[str] = []

  def handle_starttag(
    self, tag: str, attrs: list[tuple[str, str | None]]
  ) -> None:
    values = dict(attrs)
    if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
      return
    for name in ("src", "href") if tag == "link" else ("src",):
      if re.match("(https?:)?//", values.get(name) or ""):
        self.hosts.append(f"{tag} {values[name]}")


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
  loads = Loads()
  loads.feed(output)
  if loads.hosts:
    raise PluginError(f"{page.file.src_uri} loads {', '.join(loads.hosts)}")
  return output


def on_post_build(config: MkDocsConfig) -> None:
  index = Path(config.site_dir, "search", "search_index.json")
  if not index.exists() or not json.loads(index.read_bytes())["docs"]:
    raise PluginError("the site has no search index")
