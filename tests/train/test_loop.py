"""Whole runs on a tiny encoder: what they leave, and that they resume."""

import inspect
import json
import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_profile import traced
from vera_jax import results
from vera_jax.adapters.card import model_card
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.methods import settings_in
from vera_jax.adapters.stored_pair import in_file
from vera_jax.data.loader import PackedData
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.serve.predictor import Predictor
from vera_jax.tasks.glue import glue_task
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.metrics import accuracy
from vera_jax.train import compiled_step, loop, workdir
from vera_jax.train.ensemble import train_ensemble
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.preemption import Interrupted
from vera_jax.train.run import Run, best_epoch
from vera_jax.train.step import train_step
from vera_jax.train.workdir import write_config

HEAD = {"classifier.kernel", "classifier.bias"}
QV = {"query", "value"}
# Sizes by hand: width 16, two layers, rank 8; two labels.
ADAPTERS = {
  "vera": 2 * 2 * (16 + 8),
  "dvora+ia3": 2 * 2 * (2 * 16 + 8) + 2 * (16 + 16 + 32),
}


def read_lines(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def losses(folder):
  return [line["loss"] for line in read_lines(folder) if "loss" in line]


def check_result(config, folder, result):
  """Everything is there, and the numbers agree with one another."""
  assert result == json.loads((folder / "result.json").read_text())
  assert result["config"] == json.loads((folder / "config.json").read_text())
  assert result["method"] == config.method and result["seed"] == config.seed
  epochs, count = result["history"], config.optim.epochs
  assert [e["epoch"] for e in epochs] == [1 + i for i in range(count)]
  assert [e["step"] for e in epochs] == [10 + 10 * i for i in range(count)]
  assert all(e["score"] == e["metrics"]["accuracy"] for e in epochs)
  assert result["last"] == epochs[-1] and result["best"] in epochs
  assert result["score_name"] == "accuracy"
  assert result["parameters"]["adapter"] == ADAPTERS[config.method]
  assert result["parameters"]["head"] == 34
  assert len(result["projection_digest"]) == 64
  assert result["data"]["train"]["examples"] == 40
  assert len(result["data"]["validation"]["fingerprint"]) == 64
  assert {"python", "jax", "flax", "vera_jax"} <= result["versions"].keys()
  assert result["device"]["count"] == 8
  assert result["seconds"] > 0
  assert result["learning_rates"] == {"adapter_lr": 0.02, "head_lr": 0.05}
  assert len(losses(folder)) == 10 * count and np.isfinite(losses(folder)).all()


def test_an_automatic_rate_is_the_rules(tiny_config, tmp_path, capsys):
  """The number that a run trained with is in its result, and said at first."""
  config = tiny_config(optim__adapter_lr="auto", optim__epochs=1)
  result = train_and_evaluate(config, tmp_path)
  # equation: (0.6)^2 = 4 s^2 (0.1^2 + s^2) for each of four layers
  rate = result["learning_rates"]["adapter_lr"]
  s = rate * (10 / 3) ** 0.5  # ten steps
  assert 4 * s**2 * (0.1**2 + s**2) * 4 == pytest.approx(0.6**2)
  assert result["config"]["optim"]["adapter_lr"] == "auto"
  said = f"adapter_lr {rate:.3g}, by the rule of docs/rates.md for vera on"
  assert said in capsys.readouterr().err


@pytest.mark.smoke
def test_a_run_leaves_what_was_promised(finished):
  check_result(*finished)
  assert {path.name for path in finished.folder.iterdir()} == {
    "config.json",
    "began",
    "checkpoints",
    "metrics.jsonl",
    "tensorboard",
    "adapter",
    "result.json",
  }


def test_the_speed_is_in_metrics_and_result(finished):
  """From the third step on, since the first one compiles."""
  names = {"step_seconds", "data_wait", "tokens_per_second"}
  names |= {"flops_per_second", "goodput"}  # and no share of an unknown peak
  steps = [line for line in read_lines(finished.folder) if "loss" in line]
  for line in steps[2:]:
    assert {x for x in line if "speed" in x} == {f"speed/{x}" for x in names}
    assert all(line[f"speed/{name}"] >= 0 for name in names)
  speed = finished.result["speed"]
  assert speed.keys() == names | {"starts", "seconds"}
  parts = speed["seconds"]
  assert speed["goodput"] == parts["steps"] / sum(parts.values())
  assert all(seconds >= 0 for seconds in parts.values())
  for name in ("start", "compiling", "steps", "evaluation", "saving", "result"):
    assert parts[name] > 0
  assert parts["lost"] == parts["profiling"] == 0
  # 40 texts, of which no two steps of an epoch have the same
  tokens = finished.result["data"]["train"]["examples"]
  seconds = 29 * speed["step_seconds"]
  assert speed["tokens_per_second"] * seconds > 29 * tokens / 10
  began = float((finished.folder / "began").read_text())
  ended = (finished.folder / "result.json").stat().st_mtime
  assert sum(parts.values()) == pytest.approx(ended - began, rel=0.2)


def test_a_chain_goes_by_the_same_loop(tiny_config, quiet_model, tmp_path):
  """Without dropout, whose programs take longer to compile."""
  config = tiny_config(
    method="dvora+ia3",
    model__name=str(quiet_model),
    optim__epochs=1,
    log__profile="4:6",
  )
  folder = tmp_path / "run"
  result = train_and_evaluate(config, folder)
  check_result(config, folder, result)
  assert traced(folder, "4-6") == [4, 5, 6]
  assert result["speed"]["seconds"]["profiling"] > 0
  saved = load_adapter(folder / "adapter")
  assert saved.about["settings"] == json.loads(
    json.dumps(in_file(settings_in(config, config.method)))
  )
  restore_adapter(saved)


def test_the_mean_of_an_epochs_losses_is_its_training_loss(finished):
  for epoch, steps in zip(
    finished.result["history"],
    np.reshape(losses(finished.folder), (3, 10)),
    strict=True,
  ):
    assert epoch["train_loss"] == pytest.approx(steps.mean(), rel=1e-6)


def test_the_adapters_files_hold_the_best_epoch(finished, saved):
  folder = finished.folder / "adapter"
  tensors = load_adapter(folder).tensors
  wanted = {
    f"encoder.layer.{i}.attention.self.{name}.vera_{vector}"
    for i in range(2)
    for name in QV
    for vector in "bd"
  }
  assert tensors.keys() == wanted | HEAD
  best = finished.result["best"]
  arrays, _ = saved(finished.folder, best["step"])
  kernel = next(
    x for name, x in arrays.items() if "params" in name and "kernel" in name
  )
  assert np.array_equal(kernel, tensors["classifier.kernel"])
  about = json.loads((folder / "adapter.json").read_text())
  assert about["score"] == best["score"]
  assert about["projection_digest"] == finished.result["projection_digest"]
  assert about["settings"]["rank"] == 8
  assert about["data"] == finished.result["data"]
  assert (folder / "README.md").read_text() == model_card(about)


def test_a_restored_adapter_answers_as_the_run_did(finished):
  """The dev score of the best epoch, from the adapter's two files."""
  classifier = restore_adapter(load_adapter(finished.folder / "adapter"))
  source = finished.config.data.source
  dev = load_split(glue_task("rte"), source, "validation")
  logits = Predictor(classifier).logits(dev.first, dev.second)
  found = accuracy(logits.argmax(-1), dev.labels)
  assert found == finished.result["best"]["score"]
  assert classifier.about["max_length"] == finished.config.data.max_length


def test_a_finished_run_is_only_reported(finished, monkeypatch):
  monkeypatch.setattr(loop, "build_setup", None)
  before = sorted(p.stat().st_mtime_ns for p in finished.folder.rglob("*"))
  assert train_and_evaluate(finished.config, finished.folder) == finished.result
  after = sorted(p.stat().st_mtime_ns for p in finished.folder.rglob("*"))
  assert before == after


def test_the_best_epoch_is_the_first_of_the_highest():
  scores = [0.5, 0.7, 0.7, 0.6]
  history = [{"epoch": i + 1, "score": s} for i, s in enumerate(scores)]
  assert best_epoch(history)["epoch"] == 2


@pytest.mark.parametrize(
  "step",
  [
    pytest.param(14, marks=pytest.mark.smoke),
    pytest.param(20, marks=pytest.mark.slow),
    pytest.param(30, marks=pytest.mark.slow),
  ],
)
def test_stopped_and_resumed_is_as_if_left_alone(
  step, finished, stop_at, tmp_path, monkeypatch, assert_same_run
):
  """In the midst of an epoch, at its end, and in the very last step."""
  folder = tmp_path / "run"
  stop_at(step)
  with pytest.raises(Interrupted, match="SIGTERM, saved at step .* of 30"):
    train_and_evaluate(finished.config, folder)
  assert not (folder / "result.json").exists()
  monkeypatch.undo()
  result = train_and_evaluate(finished.config, folder)
  assert_same_run(folder, finished.folder, 30, scored=step < 30)
  assert result["speed"]["starts"] == 2


def test_an_evaluation_that_is_stopped_is_made_again(
  finished, tmp_path, monkeypatch, assert_same_run
):
  """Saved is the state that was to be evaluated, and its scores come later.

  They are the same ones, and once in metrics.jsonl, also where the resumed run
  breaks off before its next save.
  """
  folder, measured, acts = tmp_path / "run", PackedData.measured, []

  def hooked(self, split, measure_batch):
    if acts:
      acts.pop()()
    return measured(self, split, measure_batch)

  monkeypatch.setattr(PackedData, "measured", hooked)
  acts.append(lambda: os.kill(os.getpid(), signal.SIGTERM))
  with pytest.raises(Interrupted, match="SIGTERM, saved at step 10 of 30"):
    train_and_evaluate(finished.config, folder)
  assert [line["step"] for line in read_lines(folder)] == [*range(1, 11)]
  acts += [lambda: 1 / 0, lambda: None]
  with pytest.raises(ZeroDivisionError):
    train_and_evaluate(finished.config, folder)
  assert read_lines(folder)[10]["step"] == 10 and len(read_lines(folder)) == 21
  train_and_evaluate(finished.config, folder)
  assert_same_run(folder, finished.folder, 30)


def flip_a_byte(save):
  files = [path for path in (save / "state").rglob("*") if path.is_file()]
  file = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  return file


@pytest.mark.slow
@pytest.mark.parametrize("which", ["newest", "best"])
def test_a_damaged_save_costs_steps_and_nothing_else(
  which, stopped, finished, saved, tmp_path, caplog, assert_same_run
):
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  newest = max(int(p.name) for p in (folder / "checkpoints").iterdir())
  history = saved(folder, newest)[1]["history"]
  step = newest if which == "newest" else best_epoch(history)["step"]
  file = flip_a_byte(folder / "checkpoints" / str(step))
  train_and_evaluate(finished.config, folder)
  assert f"save of step {step} is not used: {file} is damaged" in caplog.text
  assert (folder / "damaged" / str(step)).is_dir()
  assert_same_run(folder, finished.folder, 30)


def test_a_run_that_began_with_other_data_or_another_base_is_refused(
  finished, tiny_tasks, tmp_path, monkeypatch
):
  folder, file = tmp_path / "run", tiny_tasks / "RTE/train.tsv"
  shutil.copytree(finished.folder, folder)
  (folder / "result.json").unlink()
  shutil.rmtree(folder / "checkpoints/30")  # two of three epochs are there

  def go_on(*args):
    raise Interrupted("it would train")

  monkeypatch.setattr(loop, "train", go_on)
  text = file.read_text()
  try:
    file.write_text("".join(text.splitlines(keepends=True)[:5]))
    with pytest.raises(UserError, match="have changed .* began: train, or wh"):
      train_and_evaluate(finished.config, folder)
  finally:
    file.write_text(text)
  weights = Path(finished.config.model.name) / "model.safetensors"
  data = weights.read_bytes()
  try:
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="The weights in .* have changed since"):
      train_and_evaluate(finished.config, folder)
  finally:
    weights.write_bytes(data)
  also_tested = finished.config.copy_and_resolve_references()
  also_tested.predict_test = True  # a split that was not read before
  with pytest.raises(Interrupted, match="it would train"):
    train_and_evaluate(also_tested, folder)


def test_a_run_of_a_sweep_begins_with_what_the_others_began_with(
  tiny_config, tiny_tasks, tmp_path, monkeypatch
):
  """It has no save that would show a change."""
  inputs, file = tmp_path / "inputs", tiny_tasks / "RTE/train.tsv"

  def begin(seed):
    config = tiny_config()
    config.seed = seed
    train_ensemble([config], [tmp_path / f"seed{seed}"], inputs=inputs)

  def go_on(*args):
    raise Interrupted("it would train")

  monkeypatch.setattr(loop, "train", go_on)
  for seed in (0, 1):
    with pytest.raises(Interrupted, match="it would train"):
      begin(seed)
  text = file.read_text()
  try:
    file.write_text("".join(text.splitlines(keepends=True)[:5]))
    with pytest.raises(UserError, match="have changed .* began: train, or wh"):
      begin(2)
  finally:
    file.write_text(text)
  (kept,) = inputs.iterdir()
  kept.write_text(json.dumps(json.loads(kept.read_text()) | {"base": "other"}))
  with pytest.raises(UserError, match="The weights in .* have changed since"):
    begin(3)


def test_a_run_beyond_its_epochs_has_ended(tiny_config, tmp_path):
  """As after a step in the midst of larger data than there are now."""
  run = Run(tiny_config(), tmp_path / "run")
  for epoch, has_ended in ((2, False), (3, True), (6, True)):
    run.progress["history"] = [{"epoch": epoch}]
    assert run.has_ended is has_ended


def test_a_folder_at_work_is_refused_before_anything_is_loaded(
  tiny_config, tmp_path, monkeypatch
):
  folder = tmp_path / "run"
  monkeypatch.setattr(loop, "build_setup", None)
  with workdir.lock_workdir(folder):
    with pytest.raises(UserError, match="Another run is at work"):
      train_and_evaluate(tiny_config(), folder)


def test_who_lost_the_lock_writes_no_more(tiny_config, tmp_path, monkeypatch):
  """As after a sleep in which another machine took the run over."""
  folder, evaluate = tmp_path / "run", Run.evaluate
  fields = {"host": "elsewhere", "pid": 1, "started": "", "id": "a"}

  def lose(run, step, *args):
    evaluate(run, step, *args)
    if step == 20:
      (folder / "lock").write_text(json.dumps(fields))

  monkeypatch.setattr(Run, "evaluate", lose)
  with pytest.raises(workdir.LockLost, match="by process 1 on elsewhere now"):
    train_and_evaluate(tiny_config(), folder)
  assert [path.name for path in (folder / "checkpoints").glob("[0-9]*")] == [
    "10"
  ]
  assert json.loads((folder / "lock").read_text()) == fields


def test_the_last_good_save_is_left(tiny_config, tmp_path, monkeypatch, saved):
  step = compiled_step.train_step

  def broken(state, *args, **kwargs):
    state, metrics = step(state, *args, **kwargs)
    loss = jnp.where(state.step == 14, jnp.nan, metrics["loss"])
    return state, {**metrics, "loss": loss}

  monkeypatch.setattr(compiled_step, "train_step", broken)
  with pytest.raises(UserError, match="loss is nan at step 14 .* of step 10"):
    train_and_evaluate(tiny_config(), tmp_path / "run")
  arrays, progress = saved(tmp_path / "run", 10)
  assert len(progress["history"]) == 1
  assert all(np.isfinite(array).all() for array in arrays.values())


def test_an_epoch_that_ends_broken_is_not_saved(
  finished, tmp_path, monkeypatch, capsys
):
  nothing = np.full((20, 2), np.nan, np.float32)
  monkeypatch.setattr(PackedData, "measured", lambda *_: nothing)
  with pytest.raises(UserError, match="at step 10 .* No checkpoint"):
    train_and_evaluate(finished.config, tmp_path / "run")
  printed = capsys.readouterr().err  # up to there
  assert "adapter 96, head 34 of 5,714" in printed
  assert "random values: classifier/bias, classifier/kernel" in printed
  assert "no such parameter here: bert.encoder.extra.weight" in printed
  assert "not part of the model: cls.predictions.bias" in printed


def submission(folder, name):
  lines = (folder / "submission" / name).read_text().splitlines()
  return [line.split("\t") for line in lines]


def test_mnli_has_two_dev_and_two_test_splits(tiny_config, tmp_path):
  config = tiny_config(
    "mnli",
    model__scan=False,
    predict_test=True,
    optim__epochs=1,
    data__max_train_examples=8,
  )
  result = train_and_evaluate(config, tmp_path)
  assert result["best"]["metrics"].keys() == {
    "accuracy",
    "accuracy/validation_mismatched",
  }
  assert result["last"]["step"] == 2
  assert result["data"]["train"]["examples"] == 8
  names = {path.name for path in (tmp_path / "submission").iterdir()}
  assert names == {"MNLI-m.tsv", "MNLI-mm.tsv"}
  rows = submission(tmp_path, "MNLI-mm.tsv")
  assert rows[0] == ["index", "prediction"] and len(rows) == 21
  assert {word for _, word in rows[1:]} <= set(result["labels"])


def test_a_finished_run_can_still_predict(finished, tmp_path, monkeypatch):
  folder = tmp_path / "run"
  shutil.copytree(finished.folder, folder)
  config = finished.config.copy_and_resolve_references()
  config.predict_test = True
  monkeypatch.setattr(loop, "train", None)
  assert train_and_evaluate(config, folder) == finished.result
  rows = submission(folder, "RTE.tsv")
  assert [int(index) for index, _ in rows[1:]] == list(range(24))
  monkeypatch.setattr(loop, "build_setup", None)
  train_and_evaluate(config, folder)  # once is enough


def test_a_run_keeps_the_layers_that_it_began_with(
  finished, tiny_config, tmp_path
):
  """Two layers on a CPU are looped; a folder that says stacked stays so."""
  assert finished.config.model.scan == "auto"  # the caller's is left alone
  for file in (finished.folder / "config.json", finished.folder / results.FILE):
    written = json.loads(file.read_text())
    assert written.get("config", written)["model"]["scan"] is False
  for scan in ("auto", False):
    config = tiny_config(model__scan=scan)
    assert train_and_evaluate(config, finished.folder) == finished.result
  with pytest.raises(UserError, match="model.scan: False there, True now"):
    Run(tiny_config(model__scan=True), finished.folder)
  write_config(tmp_path, tiny_config(model__scan=True).to_dict())
  assert Run(tiny_config(), tmp_path).config.model.scan is True


@pytest.mark.smoke
def test_no_frozen_leaf_is_in_a_runs_saves(finished, saved):
  arrays, progress = saved(finished.folder, 30)
  paths = {name for name in arrays if "opt_state" not in name}
  leaves = [name.split("]")[-2].strip("['") for name in paths if "]" in name]
  assert set(leaves) <= {"step", "vera_b", "vera_d", "kernel", "bias", "params"}
  kernels = [name for name in arrays if "kernel" in name]
  assert kernels and all("classifier" in name for name in kernels)
  trained = 96 + 34
  numbers = sum(array.size for array in arrays.values())
  assert 3 * trained <= numbers <= 3 * trained + 10  # value and AdamW's two
  assert len(progress["history"]) == 3


@pytest.mark.parametrize("function, most", [(train_step, 50), (loop.train, 90)])
def test_the_step_and_the_loop_are_read_on_one_screen(function, most):
  assert len(inspect.getsource(function).splitlines()) <= most
