"""What failed runs look like, and what the paper prints."""

import numpy as np
import pytest

from vera_jax.adapters.vector_norms import adapter_norms, as_json
from vera_jax.report.published import published
from vera_jax.report.signatures import signatures


def norms_of(scale):
  vectors = {
    f"encoder.layer.{n}.attention.self.query.vera_{leaf}": np.full(
      16, scale if leaf == "d" else 0.1, np.float32
    )
    for n in range(3)
    for leaf in "db"
  }
  return as_json(adapter_norms(vectors))


def test_a_sound_run_shows_nothing(make_result):
  assert signatures(make_result(norms=norms_of(0.1))) == []
  assert signatures(make_result("lora")) == []


@pytest.mark.parametrize(
  "what, change",
  [
    ("collapsed", {"collapsed": True}),
    ("d gone to zero", {"norms": norms_of(1e-5)}),
    ("unstable loss", {"losses": [0.5, 0.7], "scores": (0.5, 0.6)}),
    ("unstable loss", {"losses": [0.5, float("nan")], "scores": (0.5, 0.6)}),
  ],
)
def test_each_failure_is_named(make_result, what, change):
  assert signatures(make_result(**change)) == [what]


def test_norms_are_by_layer_and_kind():
  tensors = {
    "encoder.layer.11.output.dense.vera_d": np.full(4, 2.0, np.float32),
    "encoder.layer.2.attention.self.query.vera_b": np.ones(9, np.float32),
    "encoder.layer.2.attention.self.query.lora_A": np.ones((2, 8), np.float32),
    "classifier.weight": np.ones((2, 3), np.float32),
  }
  found = {(v.layer, v.kind, v.leaf): v for v in adapter_norms(tensors)}
  assert found.keys() == {
    (2, "query", "A"),
    (2, "query", "b"),
    (11, "output", "d"),
  }
  assert found[11, "output", "d"].norm == 4 and found[2, "query", "b"].norm == 3
  assert found[11, "output", "d"].rms == 2 and found[2, "query", "A"].norm == 4


@pytest.mark.parametrize(
  "settings, printed",
  [
    ({}, (85.9, 0.7)),
    ({"size": "base"}, (78.7, 0.7)),
    ({"vera__rank": 64}, None),
    ({"vera__d_init": 1e-7}, (84.7, 0.9)),
    ({"vera__init": "uniform"}, (53.1, 0.8)),
    ({"vera__train": "d"}, (67.0, 13.9)),
    ({"vera__sharing": "unique"}, (84.6, 0.8)),
    ({"method": "lora"}, (85.2, 1.1)),
    ({"method": "head"}, None),
    ({"model__name": "somewhere/minilm"}, None),
  ],
)
def test_the_papers_number_is_that_of_the_same_settings(
  make_result, settings, printed
):
  found = published(make_result(**settings)["config"])
  assert (found and found[:2]) == printed
