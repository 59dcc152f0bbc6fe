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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_failed_run_shows_its_last_lines(config):
  texts = train.Texts(config)
  config.data.source = "nowhere at all"
  trainer = train.Trainer(train.OURS, "vera", "cpu")
  with pytest.raises(train.UserError, match="nowhere at all"):
    train.run(trainer, config, texts)


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.parent.name)
def test_the_table_is_that_of_the_figures(path):
  figures = json.loads(path.read_text())
  assert train_report.markdown(figures) == path.with_suffix(".md").read_text()
  trained = {(row["method"], row["trained"]) for row in figures["rows"]}
  methods = {row["method"] for row in figures["rows"]}
  assert len(trained) == len(methods)  # the same on either side


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
