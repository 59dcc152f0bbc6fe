"""Images on both sides: the same files, start, batches and losses."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import train, train_images, train_ours
from tests.pictures import COLOURS, write_classes, write_vit
from vera_jax.data.images import read_processor
from vera_jax.tasks.task import task_for


@pytest.fixture
def images(tmp_path):
  """(the config, its images) of a tiny network and a dozen pictures."""
  write_classes(tmp_path / "source/train", each=5, seed=0)
  write_classes(tmp_path / "source/test", each=3, seed=1)
  sizes = {"mlp_ratio": 2, "initializer_range": 0.2}
  base = write_vit(tmp_path / "tiny", model_type="dinov2", **sizes)
  config = train_images.get_config()
  config.data.source, config.model.name = str(tmp_path / "source"), str(base)
  config.data.shots, config.data.max_eval_examples = 4, 7
  config.data.image_size = None
  config.data.cache_dir = str(tmp_path / "cache")
  config.optim.epochs, config.optim.batch_size = 2, 5
  config.eval_batch_size, config.vera.rank = 3, 4
  config.method = "vera"
  return config, train_images.Images(config, tmp_path)


def test_our_side_reads_the_same_images(images):
  config, images = images
  data = task_for(config).load(config, images.base)
  assert images.examples == 12 and images.dev_examples == 7
  for name, files in images.files.items():
    split = data.splits[name]
    assert split.names == [file for file, _ in files]
    assert split.labels.tolist() == [label for _, label in files]
  assert images.classes == tuple(COLOURS)
  order = images.for_torch(config)["order"]
  assert [len(batch) for batch in order] == [5, 5, 2] * 2
  assert read_processor(images.base).height == 8
  head = load_file(images.base / "model.safetensors")["classifier.weight"]
  assert head.shape == (3, 32) and np.ptp(head) > 0.1


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
@pytest.mark.parametrize("method", ["vera", "head"])
def test_both_sides_learn_the_same(method, images, tmp_path):
  """As many numbers; with one start, and no decay, one loss and one score."""
  pytest.importorskip("peft")
  from benchmarks import train_images_torch

  config, images = images
  config.method, config.optim.weight_decay = method, 0.0
  settings = json.loads(
    json.dumps(
      images.for_torch(config)
      | train.place_of(train.Trainer(train.PEFT, method, "cpu"))
      | {"config": config.to_dict()}
    )
  )
  theirs = train_images_torch.train(settings)
  ours = train_ours.train(
    {"config": config.to_dict(), "workdir": str(tmp_path / "run")}
  )
  assert theirs["trained"] == ours["trained"]
  assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-4)
  assert images.scores(theirs["predictions"]) == ours["scores"]
  assert ours["evaluation"] > 0 and theirs["evaluation"] > 0
