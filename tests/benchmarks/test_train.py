"""Whole runs side by side: same data, same trained numbers, honest sums."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import train, train_ours, train_report
from configs import minilm
from tests.faults.fixtures import DEVICES, flags_but

ROOT = Path(__file__).parents[2]
FIGURES = [
  ROOT / "tests/golden/benchmark_train/train-sst2.json",
  *sorted((ROOT / "results/benchmarks").glob("train-*.json")),
]


@pytest.fixture
def config(tiny_model, tiny_tasks):
  config = minilm.get_config("rte")
  config.model.name, config.data.source = str(tiny_model), str(tiny_tasks)
  config.data.max_length, config.vera.rank = 16, 8
  config.optim.epochs, config.optim.batch_size = 2, 4
  config.eval_batch_size = 5
  return config


def test_a_run_from_the_command(tiny_model, tiny_tasks, tmp_path):
  words = ["--task=rte", f"--source={tiny_tasks}", f"--base={tiny_model}"]
  words += ["--epochs=2", "--methods=vera", "--peft=", f"--out={tmp_path}"]
  words += ["--devices=cpu"]
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.train", *words],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, "XLA_FLAGS": " ".join(flags_but(DEVICES))},
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "train-rte.json").read_text())
  table = (tmp_path / "train-rte.md").read_text()
  assert train_report.markdown(result) == table and table in done.stdout
  (row,) = result["rows"]
  assert row["imports"] > 0 and row["training"] > 0
  parts = row["imports"] + row["compilation"] + row["training"]
  assert parts == pytest.approx(row["seconds"])
  assert len(row["scores"]) == 2 and row["peak_bytes"] > 50e6
  assert "benchmarks.train --task=rte" in result["command"]


def test_a_failed_run_shows_its_last_lines(config):
  texts = train.Texts(config)
  config.data.source = "nowhere at all"
  trainer = train.Trainer(train.OURS, "vera", "cpu")
  with pytest.raises(train.UserError, match="nowhere at all"):
    train.run(trainer, config, texts)


def test_unknown_methods_and_devices_are_refused():
  for words in (["vara"], [], ["cpu"]), ([], [], ["tpu"]):
    with pytest.raises(train.UserError, match="choose from"):
      train.choose(*words)


def test_trainers_stand_side_by_side():
  chosen = train.choose(["head", "vera"], ["vera", "full"], ["cpu", "gpu"])
  assert list(map(str, chosen)) == [
    f"{name} on {device}"
    for device in ("cpu", "gpu")
    for name in ("vera_jax vera", "PEFT vera", "vera_jax head", "torch full")
  ]


@pytest.mark.parametrize("there", [(), ("torch",), ("torch", "peft")])
def test_what_is_not_installed_is_left_out(there, monkeypatch):
  monkeypatch.setattr(train, "find_spec", lambda name: name in there)
  monkeypatch.setattr(train, "_printed", lambda code: "False")  # no CUDA
  trainers = train.choose(["vera"], ["vera", "head"], ["cpu", "gpu"])
  can = {str(one) for one in trainers if train.can_run(one)}
  theirs = {"torch head on cpu"} if "torch" in there else set()
  theirs |= {"PEFT vera on cpu"} if "peft" in there else set()
  assert can == {"vera_jax vera on cpu", "vera_jax vera on gpu"} | theirs
  figures = json.loads(FIGURES[0].read_text())
  missing = [str(one) for one in trainers if not train.can_run(one)]
  table = train_report.markdown({**figures, "left_out": missing})
  assert "left out" in table and all(name in table for name in missing)


def test_ratios_are_between_the_same_method_and_device():
  outcome = {"imports": 1.0, "peak_bytes": 1, "device_peak_bytes": None}
  outcome |= {"trained": 1, "scores": [0.5]}

  def made(side, device, seconds, compilation):
    own = {"seconds": seconds, "compilation": compilation}
    trainer = train.Trainer(side, "vera", device)
    return train.row(trainer, [{**outcome, **own}], count=30, unit="tokens")

  rows = [
    made(train.OURS, "cpu", 10.0, 4.0),
    made(train.PEFT, "cpu", 31.0, 0.0),
    made(train.OURS, "gpu", 8.0, 1.0),
  ]
  assert rows[0]["training"] == 5.0 and rows[0]["tokens_a_second"] == 6.0
  ours, theirs, alone = (train.compared(row, rows) for row in rows)
  assert ours["times_faster"] == 3.1
  assert ours["times_faster_in_training"] == 6.0
  assert "times_faster" not in theirs and "times_faster" not in alone


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.parent.name)
def test_the_table_is_that_of_the_figures(path):
  figures = json.loads(path.read_text())
  assert train_report.markdown(figures) == path.with_suffix(".md").read_text()
  trained = {(row["method"], row["trained"]) for row in figures["rows"]}
  methods = {row["method"] for row in figures["rows"]}
  assert len(trained) == len(methods)  # the same on either side


def test_the_plot_is_drawn(tmp_path):
  pytest.importorskip("matplotlib")
  train_report.draw(json.loads(FIGURES[0].read_text()), tmp_path / "bars.png")
  assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def settings_for_torch(config, method, dtype="float32"):
  """What a baseline is given, on the CPU."""
  trainer = train.Trainer(train.TORCH, method, "cpu")
  given = train.Texts(config).for_torch(config) | train.place_of(trainer)
  given |= {"dtype": dtype}
  return given | {"config": {**config.to_dict(), "method": method}}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
def test_both_sides_train_as_many_numbers(config, tmp_path):
  pytest.importorskip("peft")
  from benchmarks import train_torch

  theirs = train_torch.train(settings_for_torch(config, "vera"))
  config.data.cache_dir = str(tmp_path / "tokens")
  ours = train_ours.train(
    {"config": config.to_dict(), "workdir": str(tmp_path / "run")}
  )
  assert theirs["trained"] == ours["trained"]
  scores = train.Texts(config).scores(theirs["predictions"])
  assert len(scores) == len(ours["scores"]) == 2


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_learns_and_keeps_the_base(dtype, config):
  pytest.importorskip("peft")
  import torch

  from benchmarks import train_torch

  settings = settings_for_torch(config, "vera", dtype)
  model = train_torch.build(settings)
  for name, leaf in model.named_parameters():
    kind = "float32" if leaf.requires_grad else dtype
    assert leaf.dtype == getattr(torch, kind), name
  rates = [
    (group["lr"], sum(leaf.numel() for leaf in group["params"]))
    for group in train_torch.adamw(model, settings["config"]).param_groups
  ]
  own = config.vera
  adapter = 2 * 2 * (own.rank + 16)  # two layers, query and value, 16 wide
  assert rates == [(own.lr, adapter), (own.head_lr, 2 * 16 + 2)]
  assert len(train_torch.train(settings)["predictions"]) == 2


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_torchs_predictions_keep_the_order_of_the_texts(config):
  pytest.importorskip("torch")
  from transformers import AutoTokenizer, DataCollatorWithPadding

  from benchmarks import train_torch

  settings = settings_for_torch(config, "head")
  settings["outputs"] = 1  # values tell more than classes
  tokenizer = AutoTokenizer.from_pretrained(settings["base"])
  rows = train_torch.encode(tokenizer, settings["splits"]["validation"], 16)
  model = train_torch.build(settings)
  collate = DataCollatorWithPadding(tokenizer)
  predicted = partial(train_torch.predict, model, collate=collate)
  found = predicted(rows, size=5)
  alone = [predicted([row], size=1)[0] for row in rows]
  np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)
  assert np.ptp(found) > 1e-3
