"""The commands for images, as a user types them."""

import json

import pytest

from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError


# ml_collections loads config files by it
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_training_answers_and_a_grid_of_pictures(
  tiny_images, tiny_vit, tmp_path, tmp_path_factory, typed, capsys
):
  trained = tmp_path_factory.mktemp("trained") / "run"
  typed(
    "images",
    "--config=configs/images/cifar10.py:base",
    f"--config.data.source={tiny_images}",
    f"--config.model.name={tiny_vit}",
    f"--config.data.cache_dir={trained.parent / 'cache'}",
    "--config.data.shots=3",
    "--config.optim.epochs=1",
    "--config.vera.rank=8",
    f"--workdir={trained}",
  )
  remarks = capsys.readouterr().err
  assert "classes: 3; images: 9 for training, 12 are scored" in remarks
  (tmp_path / "one").mkdir()
  good = tmp_path / "one/good.png"
  good.write_bytes((tiny_images / "test/red/0.png").read_bytes())
  (tmp_path / "bad.jpg").write_text("no picture")
  adapter = f"--adapter={trained / 'adapter'}"
  with pytest.raises(UserError, match="1 of 2 images could not be read."):
    typed("predict", adapter, f"--input={tmp_path}")
  table, remarks = capsys.readouterr()
  assert "bad.jpg: cannot identify image" in remarks
  header, bad, line = table.splitlines()
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
  typed("predict", adapter, f"--input={good}", "--format=jsonl")
  answer = json.loads(capsys.readouterr().out)
  assert (answer["file"], answer["label"]) == (str(good), label)
  out = tmp_path / "grid.png"
  typed("pictures", trained, f"--out={out}", "--count=5")
  assert out.read_bytes().startswith(b"\x89PNG")
  with pytest.raises(UserError, match="Name the runs' folders"):
    typed("pictures")
  with pytest.raises(UserError, match="No result of a run"):
    typed("pictures", tmp_path, f"--out={out}")
