"""Keys, exit codes and the closing table, without starting a process."""

import re
from types import SimpleNamespace

import pytest

from configs import rte
from experiments import cli
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
  ],
)
def test_exit_codes(error, code, capsys):
  def main():
    if error is not None:
      raise error

  assert cli.exit_code(main) == code
  assert "Traceback" not in capsys.readouterr().err


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


def test_the_closing_table(capsys):
  epoch = {"epoch": 2, "metrics": {"accuracy": 0.75, "f1": 0.5}}
  last = {"epoch": 3, "metrics": {"accuracy": 0.7, "f1": 0.25}}
  result = {
    "task": "mrpc",
    "method": "vera",
    "best": epoch,
    "last": last,
    "parameters": {"adapter": 43008, "head": 592130},
    "seconds": 12.3,
  }
  cli.show_result(result, "runs/x")
  shown = capsys.readouterr().out
  for word in ("mrpc, vera", "0.7500", "0.2500", "43,008", "592,130", "runs/x"):
    assert word in shown


def test_the_table_of_several_seeds(capsys):
  def result(seed, score):
    best = {"epoch": 2, "score": score, "metrics": {}}
    last = {"epoch": 3, "score": score - 0.1, "metrics": {}}
    facts = {"task": "rte", "method": "vera", "score_name": "accuracy"}
    return {**facts, "seed": seed, "best": best, "last": last}

  failed = {"seed": 7, "failed": "The loss is nan at step 3.", "step": 3}
  results = [result(4, 0.8), failed, result(5, 0.75), result(6, 0.6)]
  cli.show_seeds(results, [f"runs/{i}" for i in range(4)])
  shown = capsys.readouterr().out
  assert "rte, vera, accuracy" in shown
  for row in ("4 .*80.0.*70.0", "7 .*step 3", "median.*75.0 .60.0 to 80.0."):
    assert re.search(row, shown), row
  assert "runs/3" in shown
  cli.show_seeds([failed], ["runs/0"])
  assert "median" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections calls it
@pytest.mark.parametrize(
  "text, words",
  [
    ("# Title", "no attribute 'get_config'"),
    ("A title", "invalid syntax"),
    ("import no_such_module", "No module named 'no_such_module'"),
    ("def get_config(): return name", "name 'name' is not defined"),
  ],
)
def test_a_file_that_is_no_config_is_the_users_mistake(text, words, tmp_path):
  file = tmp_path / "config.py"
  file.write_text(text)
  with pytest.raises(UserError, match=f"is no file with .*{words}"):
    cli._ConfigParser("config").parse(str(file))


def test_no_config_is_the_users_mistake():
  with pytest.raises(UserError, match="--config=configs/rte.py"):
    cli.chosen(SimpleNamespace(value=None))
