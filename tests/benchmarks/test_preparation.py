"""How EfficientNet-Lite0's images are prepared is what the comparison says."""

from pathlib import Path

from benchmarks.preparation import KINDS, PHOTOGRAPHS, WAYS
from vera_jax.files import read_json
from vera_jax.models.torch_folder import PREPROCESSOR

FOUND = Path(__file__).parents[2] / "results/benchmarks/preparation.json"


def test_images_are_prepared_as_is_answered_best():
  rows = read_json(FOUND)["rows"]
  assert [row["way"] for row in rows] == list(WAYS)
  best = max(rows, key=lambda row: row["right"])
  assert best["probability"] == max(row["probability"] for row in rows)
  for photograph in PHOTOGRAPHS:
    found = [row["photographs"][photograph] for row in rows]
    assert best["photographs"][photograph] == max(found)
  mean, std = WAYS[best["way"]]
  assert list(mean) == PREPROCESSOR["image_mean"]
  assert list(std) == PREPROCESSOR["image_std"]


def test_no_class_is_of_two_kinds():
  classes = [number for kind in KINDS.values() for number in kind]
  assert len(set(classes)) == len(classes) and set(classes) <= set(range(1000))
