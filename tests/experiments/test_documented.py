"""Commands of the pages: their scripts, flags, configs and settings are there.

They are read and not run.
"""

import inspect
import re
import shlex
from importlib import import_module

import pytest

from experiments import cli, console
from tests.experiments.command import ROOT
from vera_jax.adapters.methods import check_key

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
COMMAND = re.compile(
  r"(?:python -m experiments\.|(?:vera-jax|python -m vera_jax) +)([a-z]\w*)(.*)"
)
ABSL = {"help", "flagfile", "verbosity"}


def commands(text):
  """(script, its words) of each command in a page's fences and in backticks."""
  for fence, code in re.findall(r"```\w*\n(.*?)```|`([^`]+)`", text, re.DOTALL):
    lines = re.sub(r"\\\n|\n {2,}(?=--)", " ", fence or code).splitlines()
    if code:
      lines = [" ".join(lines)]
    for line in lines:
      if match := COMMAND.search(line.partition("  #")[0]):
        yield match[1], match[2]


def flags_of(script):
  """The names of the flags that a script defines, by its source."""
  source = (console.FOLDER / f"{script}.py").read_text()
  shared = re.findall(r"cli\.(define_\w+)\(", source)
  for name in shared:
    source += inspect.getsource(getattr(cli, name))
  names = {
    *re.findall(r"(?:DEFINE_\w+|define_optional_integer)\(\s*\"(\w+)\"", source)
  }
  if "define_config" in shared:
    names.add("config")
  imported = r"^from experiments(?: import |\.)(\w+(?:, \w+)*)"
  for modules in re.findall(imported, source, re.MULTILINE):
    for other in {*modules.split(", ")} - {"cli", "console"}:
      if (console.FOLDER / f"{other}.py").is_file():
        names |= flags_of(other)
  return names | ABSL | {"quiet"}


def check(script, words):
  """Raises an AssertionError or a UserError for what is not there."""
  assert (console.FOLDER / f"{script}.py").is_file(), script
  known = flags_of(script)
  given = re.findall(r"(?<![\w-])--(no)?([a-z]\w*)((?:\.\w+)*)(=\S*)?", words)
  configs = [value[1:] for _, name, key, value in given if name == "config"]
  config = None
  if (named := next(filter(None, configs), "")) and re.match(r"[\w/]+", named):
    name, _, variant = shlex.split(named)[0].strip("[]`).,").partition(":")
    name = name.removeprefix("configs/").removesuffix(".py")
    if name == name.lower() and not name.startswith(("tests/", "benchmarks/")):
      cli.config_file(name)
      module = import_module(f"configs.{name.replace('/', '.')}")
      config = module.get_config(*re.findall(r"^\w+$", variant))
  for negated, name, key, _ in given:
    if name == "config" and key:
      if config is not None:
        check_key(config, key[1:])
    elif script != "launch":  # which passes others on
      assert name in known or negated + name in known, f"{script} --{name}"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_to_type_is_there(page):
  for script, words in commands((ROOT / page).read_text()):
    check(script, words)


@pytest.mark.parametrize(
  "line",
  [
    "`python -m experiments.nothing`",
    "`vera-jax predict --adaptor=a`",
    "`vera-jax train --config=txt`",
    "```\nvera-jax train --config=text \\\n  --config.data.trian=a.csv\n```",
  ],
)
def test_what_is_not_there_is_noticed(line):
  with pytest.raises((AssertionError, cli.UserError)):
    for script, words in commands(line):
      check(script, words)
