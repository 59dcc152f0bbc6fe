"""Whole runs on images: what holds for texts holds for them."""

import json
import re
import shutil

import numpy as np
import pytest

from configs.images import get_config
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.export.hf import write_merged
from vera_jax.pretrained.classifier import load_classifier, restore_adapter
from vera_jax.report.frame import load_sweep
from vera_jax.serve.image_predictor import ImagePredictor
from vera_jax.serve.predictor import Predictor
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.ridge import ridge
from vera_jax.train.setup import build_setup, introduction

EPOCHS = 3


@pytest.fixture(scope="session")
def images_config(tiny_images, tiny_vit, tmp_path_factory):
  """Makes a config of 3 steps per epoch; optim__epochs=1 changes that."""
  settings = {
    "model.name": str(tiny_vit),
    "data.source": str(tiny_images),
    "data.cache_dir": str(tmp_path_factory.mktemp("images")),
    "data.shots": 6,
    "data.flip": True,
    "data.shift": 1,
    "optim.epochs": EPOCHS,
    "optim.batch_size": 8,
    "optim.adapter_lr": 0.02,
    "optim.head_lr": 0.1,
    "vera.rank": 8,
    "eval_batch_size": 8,
    "log.every": 1,
  }

  def make(**changes):
    config = get_config()
    changes = {key.replace("__", "."): x for key, x in changes.items()}
    config.update_from_flattened_dict({**settings, **changes})
    return config

  return make


@pytest.fixture(scope="session")
def run(images_config, tmp_path_factory):
  """(config, folder, result) of VeRA, left alone. Look, don't touch."""
  folder = tmp_path_factory.mktemp("images") / "run"
  config = images_config()
  return config, folder, train_and_evaluate(config, folder)


def test_a_run_learns_colours_and_its_adapter_answers_files(run, tiny_images):
  """The files' accuracy is the run's score; order and batches change none."""
  _, folder, result = run
  assert result["task"].startswith("images:tiny_images")
  assert result["labels"] == ["blue", "green", "red"]
  assert result["best"]["score"] > 0.6
  assert result["parameters"]["adapter"] == 2 * 2 * (8 + 16)
  assert result["parameters"]["head"] == 3 * 17
  assert result["data"]["train"]["examples"] == 18
  assert result["data"]["dev"]["examples"] == 12
  predictor = ImagePredictor(restore_adapter(load_adapter(folder / "adapter")))
  files = sorted((tiny_images / "test").rglob("*.png"))
  found = predictor.answers(files)
  right = [f.parent.name == a.label for f, a in zip(files, found, strict=True)]
  assert np.mean(right) == pytest.approx(result["best"]["score"])
  twice = [*files[::-1], files[0].read_bytes(), *files]  # 16 and 9 images
  logits = predictor.logits(twice)
  alone = predictor.logits(files[:1])
  np.testing.assert_allclose(
    logits[[11, 12, 13]], alone.repeat(3, 0), atol=1e-5
  )
  assert np.abs(logits[0] - logits[11]).max() > 1e-3
  with pytest.raises(UserError, match="Image 1, nowhere.png, can't be read"):
    predictor.logits([files[0], "nowhere.png"])
  with pytest.raises(UserError, match="reads images. Use an ImagePredictor"):
    Predictor(predictor.classifier)
  card = (folder / "adapter/README.md").read_text()
  assert '"image-classification"' in card and "ImagePredictor(" in card


@pytest.mark.slow
def test_another_mesh_and_smaller_microbatches_train_the_same(
  run, images_config, tmp_path
):
  """One evaluation at the end scores what that of each epoch does."""
  *_, result = run
  config = images_config(
    mesh={"runs": 1, "data": 2, "fsdp": 2, "tensor": 2},
    optim__microbatch_rows=4,
    eval_epochs=EPOCHS,
  )
  other = train_and_evaluate(config, tmp_path / "run")
  (epoch,) = other["history"]
  assert epoch["epoch"] == EPOCHS and not other["stopped_early"]
  last = result["last"]
  assert epoch["score"] == pytest.approx(last["score"])
  mean = np.mean([e["train_loss"] for e in result["history"]])
  assert epoch["train_loss"] == pytest.approx(mean, rel=1e-4)
  with pytest.raises(UserError, match="a divisor of the 3 epochs"):
    train_and_evaluate(images_config(eval_epochs=2), tmp_path / "no")


@pytest.mark.slow
def test_merged_it_answers_the_same(run, tiny_images, tmp_path):
  _, folder, _ = run
  adapted = restore_adapter(load_adapter(folder / "adapter"))
  about = write_merged(adapted, tmp_path / "merged")
  assert about["differences"]["float32"] <= 1e-5
  merged = load_classifier(tmp_path / "merged")
  files = sorted(tiny_images.rglob("*.png"))[:5]
  ours, theirs = (ImagePredictor(m).logits(files) for m in (adapted, merged))
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  fields = json.loads((tmp_path / "merged/config.json").read_text())
  assert fields["architectures"] == ["ViTForImageClassification"]
  assert fields["id2label"] == {"0": "blue", "1": "green", "2": "red"}


def test_ridge_needs_no_rates_and_stands_in_reports(
  run, images_config, tmp_path
):
  config, folder, _ = run
  shutil.copytree(folder, tmp_path / "vera")
  result = ridge(config, tmp_path / "ridge")
  assert result["best"]["score"] > 0.9 and result["method"] == "ridge"
  assert ridge(config, tmp_path / "ridge") == result  # as it was written
  runs = load_sweep(tmp_path).runs
  assert runs["method"].tolist() == ["vera", "ridge"]
  assert runs["score"].iloc[1] == 100 * result["best"]["score"]
  assert runs["data"].nunique() == 1  # so that the two can be paired


def test_unreadable_images_are_said_at_the_start(
  images_config, tiny_images, tmp_path
):
  folder = tmp_path / "some"
  shutil.copytree(tiny_images / "train", folder)
  for i in range(8):
    (folder / f"red/{i}.png").write_text("no picture")
  config = images_config(data__source=str(folder))
  setup = build_setup(config)
  lines = list(introduction(setup, ["seed 0"]))
  said, of_dev = [line for line in lines if "left out" in line]
  assert (
    said.startswith("6 of 18 images in train can't be read") and "red" in said
  )
  assert of_dev.startswith("2 of 6 images in dev can't be read")
  assert "of training images that are not trained on" in " ".join(lines)
  named = r"adapter on \d+ layers: \d+ Dense"
  assert any(re.fullmatch(named, line) for line in lines)
  record = setup.data.record()
  assert [len(record[s]["unreadable"]) for s in ("train", "dev")] == [6, 2]


def test_what_is_scored(images_config, tiny_images):
  """The test split, some of it, or training images that are not trained on."""
  from vera_jax.tasks.task import task_for

  def sizes(**changes):
    size = task_for(images_config(**changes)).presentation.size
    return size.train, size.dev

  assert sizes() == (18, 12)
  assert sizes(data__max_eval_examples=5) == (18, 5)
  assert sizes(data__dev_shots=2) == (18, 6)
  assert sizes(data__shots=None) == (24, 12)
  assert sizes(data__shots=None, data__dev_shots=1) == (21, 3)
  assert sizes(data__max_train_examples=7) == (7, 12)
  with pytest.raises(UserError, match="max_eval_examples is 13, but .* 12"):
    sizes(data__max_eval_examples=13)
  train = str(tiny_images / "train")
  assert sizes(data__source=train) == (18, 6)
  with pytest.raises(UserError, match="no test split"):
    sizes(data__source=train, data__shots=None)
  with pytest.raises(UserError, match="no image left to score"):
    sizes(data__source=train, data__shots=8)


def test_models_and_data_that_do_not_go_together(
  images_config, tiny_config, tiny_model, tiny_vit, tmp_path
):
  bert = tmp_path / "bert"
  shutil.copytree(tiny_model, bert)
  shutil.copy(tiny_vit / "preprocessor_config.json", bert)
  with pytest.raises(UserError, match="a bert, which reads texts"):
    build_setup(images_config(model__name=str(bert)))
  vit = tmp_path / "vit"
  shutil.copytree(tiny_vit, vit)
  shutil.copy(tiny_model / "vocab.txt", vit)
  with pytest.raises(UserError, match="reads images|tokenizer"):
    build_setup(tiny_config(model__name=str(vit)))
  with pytest.raises(UserError, match="no room for the model's patches of 4"):
    build_setup(images_config(data__image_size=3))
  with pytest.raises(UserError, match="predict_test is for benchmarks"):
    build_setup(images_config(predict_test=True))
