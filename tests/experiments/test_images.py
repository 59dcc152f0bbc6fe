"""The commands for images, as a user types them."""

import json

import pytest

from tests.experiments.command import refused, run
from vera_jax.adapters.files import load_adapter


@pytest.fixture(scope="module")
def trained(tiny_images, tiny_vit, tmp_path_factory):
  folder = tmp_path_factory.mktemp("command")
  done = run(
    "images",
    "--config=configs/images/cifar10.py:base",
    f"--config.data.source={tiny_images}",
    f"--config.model.name={tiny_vit}",
    f"--config.data.cache_dir={folder / 'cache'}",
    "--config.data.shots=3",
    "--config.optim.epochs=1",
    "--config.vera.rank=8",
    f"--workdir={folder / 'run'}",
  )
  assert done.returncode == 0, done.stderr
  assert "classes: 3; images: 9 for training, 12 are scored" in done.stderr
  return folder / "run"


def test_a_folder_of_images_is_answered(trained, tiny_images, tmp_path):
  (tmp_path / "one").mkdir()
  good = tmp_path / "one/good.png"
  good.write_bytes((tiny_images / "test/red/0.png").read_bytes())
  (tmp_path / "bad.jpg").write_text("no picture")
  adapter = f"--adapter={trained / 'adapter'}"
  done = run("predict", adapter, f"--input={tmp_path}")
  assert done.returncode == 1
  assert "bad.jpg: cannot identify image" in done.stderr
  assert "1 of 2 images could not be read." in done.stderr
  header, bad, line = done.stdout.splitlines()
  assert header.split("\t") == [
    "file",
    "label",
    "score",
    "blue",
    "green",
    "red",
  ]
  assert bad == f"{tmp_path / 'bad.jpg'}\t"
  name, label, score, *chances = line.split("\t")
  assert name == str(good) and float(score) == max(map(float, chances))
  assert label in load_adapter(trained / "adapter").about["labels"]
  done = run("predict", adapter, f"--input={good}", "--format=jsonl")
  answer = json.loads(done.stdout)
  assert (answer["file"], answer["label"]) == (str(good), label)


def test_a_grid_of_pictures(trained, tmp_path):
  out = tmp_path / "grid.png"
  done = run("pictures", trained, f"--out={out}", "--count=5")
  assert done.returncode == 0, done.stderr
  assert out.read_bytes().startswith(b"\x89PNG")
  assert "Name the runs' folders" in refused("pictures", 1)
  assert "No result of a run" in refused(
    "pictures", 1, tmp_path, f"--out={out}"
  )
