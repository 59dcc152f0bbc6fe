"""The command vera-jax: what it answers before anything is imported."""

import json
import os
import subprocess
import sys

import pytest

from configs import text
from experiments import cli, console, reference
from experiments.settings import CONFIGS, settings
from tests.experiments.command import ROOT
from vera_jax.errors import UserError
from vera_jax.progress import show_stage
from vera_jax.terminal import Console

HEAVY = {"jax", "flax", "transformers", "numpy", "pandas"}
# Each line is a command; what it printed and what it imported comes back.
ANSWER = """
import contextlib, io, json, os, runpy, sys
for words in json.loads(sys.argv[1]):
  child = os.fork()
  if not child:
    sys.argv, said = ["vera-jax", *words], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      try:
        runpy.run_module("vera_jax", run_name="__main__", alter_sys=True)
        code = 0
      except SystemExit as end:
        code = end.code or 0
    print(json.dumps([code, said.getvalue(), sorted(sys.modules)]), flush=True)
    os._exit(0)
  os.waitpid(child, 0)
"""
ASKED = [
  (["--help"], 0, "  train     Train an adapter"),
  (["--version"], 0, "vera_jax 0."),
  (["version"], 0, "vera_jax 0."),
  (["help", "merge"], 0, "vera-jax merge --adapter="),
  (["merge", "-h"], 0, "vera-jax merge --adapter="),
  (["report", "--json"], 2, "Is it --format=json?"),
  (["train", "text"], 2, "As in: vera-jax train --config=text"),
  (["train", "--config=text", "--epochs=3"], 2, "Is it --config.optim.epochs?"),
  (["train", "--config=text", "--config.lr=1"], 2, "Is it config.vera.lr?"),
  (["train", "config.seed=1"], 2, "Is it --config.seed=1?"),
  (["trian"], 2, "Is it train?"),
  (["train", "--help"], 0, "vera-jax train --config=text"),
  (["report", "--help"], 0, "vera-jax report DIR"),
  (["train", "--config=text", "--config.vera.rnak=3"], 2, "no setting 'rnak'"),
  (["train", "--config=txt"], 2, "Is it text"),
  (["train", "--config=rte", "--config.method=lorra"], 1, "choose from vera,"),
  (
    ["train", "--config=rte", "--print_config"],
    0,
    "--config.vera.rank=1024  #",
  ),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """Of all commands, from a folder that is not the checkout's."""
  done = subprocess.run(
    [sys.executable, "-c", ANSWER, json.dumps([words for words, *_ in ASKED])],
    cwd=tmp_path_factory.mktemp("elsewhere"),
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  lines = done.stdout.splitlines()
  assert len(lines) == len(ASKED), done
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_it_answers_without_importing_what_takes_seconds(number, answers):
  (words, code, phrase), (got, said, modules) = ASKED[number], answers[number]
  assert got == code and phrase in said, (words, said)
  assert not HEAVY & set(modules), words


def test_every_command_has_a_line_of_its_own():
  lines = console.overview().splitlines()
  for name in console.COMMANDS:
    assert any(line.startswith(f"  {name} ") for line in lines)
  assert all((console.FOLDER / f"{x}.py").is_file() for x in console.OTHERS)


def test_a_config_is_a_name_or_a_file(tmp_path):
  own = tmp_path / "own.py"
  own.write_text("")
  for name in ("text", f"{CONFIGS}/text.py"):
    assert cli.config_file(f"{name}:base") == f"{CONFIGS}/text.py:base"
  assert cli.config_file(f"{own}:x") == f"{own}:x"
  for name in ("superglue/bolq", "configs/superglue/bolq.py"):
    with pytest.raises(UserError, match="Is it superglue/boolq"):
      cli.config_file(name)


def test_a_setting_is_shown_with_its_default_and_its_comment():
  config = text.get_config()
  config.vera.rank = 8
  lines = {
    setting.key: setting.line()
    for setting in settings(config, text.get_config(), CONFIGS / "text.py")
  }
  assert lines["vera.rank"].startswith(
    "--config.vera.rank=8  (default: 256)  #"
  )
  assert lines["data.train"] == "--config.data.train=  # a file"
  assert "unset: by the labels" in lines["data.kind"]


def test_the_pages_are_those_of_the_code():
  """Every setting says what it is; `experiments.reference` writes the pages."""
  for name, page in reference.pages().items():
    assert "|  |\n" not in page.replace("|  |\n| --- |", "")
    assert (reference.DOCS / name).read_text() == page


def test_quiet_hushes_standard_error_alone(capsys, monkeypatch):
  monkeypatch.setattr(Console, "hushed", True)
  for stderr in (True, False):
    Console(stderr=stderr).print("a path " * 40)
  captured = capsys.readouterr()
  assert captured.out == "a path " * 40 + "\n"  # in one piece, in a pipe
  assert captured.err == ""


def test_what_is_done_now_is_for_a_terminal(capsys, monkeypatch):
  show_stage("reading")
  assert capsys.readouterr().err == ""
  monkeypatch.setattr(Console, "is_terminal", True)
  show_stage("reading")
  assert capsys.readouterr().err == "reading ...\n"


def test_a_result_as_json_has_standard_output_alone(capsys, monkeypatch):
  monkeypatch.setattr(cli, "_result", {})

  def work():
    print("a table")
    cli.give({"score": 1.5})

  cli._as_json(work)
  captured = capsys.readouterr()
  assert json.loads(captured.out) == {"score": 1.5}
  assert captured.err == "a table\n"
