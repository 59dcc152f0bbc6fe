"""Keys, exit codes and the closing table, without starting a process."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from configs import rte
from configs.sweeps import rank
from experiments import cli, closing, interrupt
from tests.experiments.command import ROOT
from vera_jax.errors import UserError
from vera_jax.train.preemption import Interrupted


def refuse(*arguments):
  with pytest.raises(UserError) as caught:
    cli.check_keys(rte.get_config(), arguments)
  return str(caught.value)


def test_an_unknown_key_is_shown_its_neighbours():
  message = refuse("--config.vera.rnak=3")
  assert "config.vera has no setting 'rnak'" in message
  for name in rte.get_config().vera:
    assert name in message
  assert "vera" in refuse("--config.vrea.rank", "3")
  assert "predict_test" in refuse("--noconfig.predict")
  assert "not a group" in refuse("--config.seed.x=1")
  assert "not a group" in refuse("--config.optim.adapter_lr.x=1")


def test_known_keys_and_other_flags_pass():
  cli.check_keys(
    rte.get_config(),
    [
      "--config=configs/rte.py",
      "--config.vera.rank=3",
      "-config.optim.head_lr=1",
      "--noconfig.predict_test",
      "--config.vera.targets[0]=query",
      "--workdir=config.nothing",
    ],
  )


@pytest.mark.parametrize(
  "method, idle",
  [
    ("head", ["model.contraction", "optim.adapter_lr", "lora.rank"]),
    ("bitfit", ["model.contraction", "lora.rank"]),
    ("lora", []),
    ("vera", ["lora.rank"]),
  ],
)
def test_a_setting_without_effect_is_remarked(method, idle, capsys):
  config = rte.get_config()
  config.method = method
  cli.remark_idle(config, ["--config=configs/rte.py"])
  assert capsys.readouterr().err == ""  # of defaults nothing is said
  given = ["model.contraction", "optim.adapter_lr", "optim.head_lr"]
  arguments = [f"--config.{key}=1" for key in (*given, "lora.rank", "seed")]
  cli.remark_idle(config, arguments)
  lines = capsys.readouterr().err.splitlines()
  assert lines == [
    f"--config.{key} has no effect with config.method={method}." for key in idle
  ]


@pytest.mark.parametrize(
  "error, code",
  [
    (None, 0),
    (UserError("mend it"), 1),
    (Interrupted("saved"), 75),
    (KeyboardInterrupt(), 130),
    (PermissionError(13, "Permission denied", "a\x1b.tsv"), 1),
    (BrokenPipeError(32, "Broken pipe"), 1),  # not of standard output
  ],
)
def test_exit_codes(error, code, capsys):
  def main():
    if error is not None:
      raise error

  assert cli.exit_code(main) == code
  said = capsys.readouterr().err
  assert "Traceback" not in said and "\x1b" not in said
  if isinstance(error, PermissionError):
    assert said == "a\\x1b.tsv can't be used: Permission denied.\n"


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path):
  """Also where something that is imported takes KeyboardInterrupt for an error
  of its own, as C extensions do."""
  script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(tmp_path)!r})
sys.argv = ["-m"]  # as Python has it, until it has found the module
import experiments
import slow
"""
  (tmp_path / "slow.py").write_text(
    "import os, signal\n"
    "try:\n  os.kill(os.getpid(), signal.SIGINT)\n  sum(range(1000))\n"
    "except BaseException as error:\n  raise ImportError from error\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (130, "Stopped.\n")


def test_ctrl_c_is_caught_by_the_command():
  def main():
    signal.raise_signal(signal.SIGINT)

  before = signal.signal(signal.SIGINT, interrupt)
  try:
    assert cli.exit_code(main) == 130
  finally:
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_before_the_command_begins_is_one_line():
  script = """
import signal
from experiments import handle_ctrl_c
signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored here
handle_ctrl_c()
signal.raise_signal(signal.SIGINT)
"""
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (130, "Stopped.\n")


def test_ctrl_c_in_a_callback_is_not_lost(monkeypatch, capsys):
  """Where Python drops what is raised."""
  monkeypatch.setattr(sys, "unraisablehook", cli.raise_again)

  class Dropped:
    def __del__(self):
      raise KeyboardInterrupt

  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt):
      Dropped()  # is gone at once
      for _ in range(100):  # interrupt_main wakes nobody who sleeps
        time.sleep(0.1)
  finally:
    signal.signal(signal.SIGINT, before)
  assert capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback():
  def main():
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    cli.exit_code(main)


def test_one_folder_per_config():
  def folder(**changes):
    config = rte.get_config()
    config.update_from_flattened_dict(changes)
    return cli.default_workdir(config).as_posix()

  assert re.fullmatch(r"runs/rte/vera-seed0-[0-9a-f]{8}", folder())
  assert folder() == folder(**{"log.every": 1}) == folder(predict_test=True)
  assert len({folder(), folder(seed=1), folder(**{"vera.rank": 2})}) == 3


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections calls it
@pytest.mark.parametrize(
  "text, words",
  [
    ("# Title", "no attribute 'get_config'"),
    ("import no_such_module", "No module named 'no_such_module'"),
    ("def get_config(): return name", "name 'name' is not defined"),
    ("def get_config(): return 3", "it returns 3, and no ConfigDict"),
    ("def get_config(): open('/none')", "No such file .* '/none'"),
    ("raise SystemExit('bye')", "SystemExit: bye"),
  ],
)
def test_a_file_that_is_no_config_is_the_users_mistake(text, words, tmp_path):
  file = tmp_path / "config.py"
  file.write_text(text)
  with pytest.raises(UserError, match=f"is no file with .*{words}"):
    cli._ConfigParser("config").parse(str(file))


def test_no_config_or_one_of_the_other_kind():
  def refuse(value, match, **kind):
    with pytest.raises(UserError, match=match):
      cli.chosen(SimpleNamespace(value=value), **kind)

  refuse(None, "--config=rte")
  refuse(None, "--config=sweeps/rank", sweep=True)
  refuse(rank.get_config(), "`vera-jax sweep` trains it")
  refuse(rte.get_config(), "`vera-jax train` trains", sweep=True)


@pytest.mark.parametrize(
  "size, error", [(9, None), (100_000, None), (9, UserError("mend it"))]
)
def test_standard_output_that_is_full(size, error, monkeypatch, capsys):
  def main():
    print("x" * size)
    if error is not None:
      raise error

  with open("/dev/full", "w") as full:
    monkeypatch.setattr("sys.stdout", full)
    assert cli.exit_code(main) == 1
    monkeypatch.undo()
  *rest, line = capsys.readouterr().err.splitlines()
  assert rest == ([] if error is None else ["mend it"])
  assert "tandard output" in line and "No space left on device" in line


@pytest.mark.parametrize("size", [9, 100_000])
def test_standard_output_whose_reader_has_enough(size, monkeypatch, capsys):
  read, write = os.pipe()
  os.close(read)
  with open(write, "w") as pipe:
    monkeypatch.setattr("sys.stdout", pipe)
    assert cli.exit_code(lambda: print("x" * size)) == 0
    print("more, which nobody reads")
    monkeypatch.undo()
  assert capsys.readouterr().err == ""


def test_standard_output_that_is_closed(monkeypatch, capsys):
  monkeypatch.setattr("sys.stdout", None)
  with pytest.raises(SystemExit) as caught:
    cli.run(lambda: None, usage="")
  monkeypatch.undo()
  assert caught.value.code == 1
  assert "Standard output is closed" in capsys.readouterr().err


def test_an_input_is_a_file_or_what_the_shell_has_opened(tmp_path):
  file, pipe = tmp_path / "a.tsv", tmp_path / "pipe"
  file.write_bytes(b"one\ntwo\n")
  with cli.opened(str(file)) as lines:
    assert list(lines) == [b"one\n", b"two\n"]
  ours, theirs = os.pipe()  # as for --input=<(command)
  os.write(theirs, b"one\n")
  os.close(theirs)
  with cli.opened(f"/dev/fd/{ours}") as lines:
    assert list(lines) == [b"one\n"]
  os.close(ours)
  os.mkfifo(pipe)
  for name, words in (
    (f"/dev/fd/{ours}", "can't be read: Bad file descriptor"),
    (str(pipe), "it is a pipe"),
    ("/dev/zero", "it is a device"),
    (str(tmp_path / "none"), "There is no"),
  ):
    with pytest.raises(UserError, match=words), cli.opened(name):
      pass


def test_the_numbers_of_classes_are_whole_at_any_width(capsys, monkeypatch):
  labels = ["entailment", "not_entailment [x]"]
  for columns in (40, 60, 80):
    monkeypatch.setenv("COLUMNS", str(columns))
    closing.show_classes(labels, [[42, 104], [33, 98]])
    shown = capsys.readouterr().out
    for text in ("146", "0.5600", "0.2877", "0.3801", "131", "0.5886"):
      assert text in shown, columns
    assert ("104" in shown) == ("taken for" in shown) == (columns == 80)
    assert "[x]" in shown and "\\" not in shown
    assert max(map(len, shown.splitlines())) <= columns
