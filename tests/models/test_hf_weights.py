"""Checkpoints in and out, against values that transformers computed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.slow import rest_is_slow
from vera_jax.errors import UserError
from vera_jax.models.bert import BertClassifier
from vera_jax.models.family import load_config
from vera_jax.models.hf_weights import (
  load_params,
  to_hf,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = [
  "bert_three_labels",
  "bert_regression",
  "roberta_three_labels",
  "roberta_regression",
]
BERT = GOLDEN / "bert_three_labels"
SCAN = pytest.mark.parametrize("scan", [True, False])


@pytest.fixture
def copy(tmp_path):
  """Writes a changed copy of a golden checkpoint; answers with its folder."""

  def make(tensors, config=BERT / "config.json") -> Path:
    (tmp_path / "config.json").write_bytes(Path(config).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path

  return make


@pytest.fixture
def load(shapes):
  """Loads a folder into a model of its own config."""

  def make(folder, labels=3, scan=True, **options):
    model = BertClassifier(load_config(folder), labels, scan=scan)
    return model, load_params(folder, shapes(model), **options)

  return make


@pytest.mark.parametrize("scan", rest_is_slow([True, False]))
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name, scan, load, apply):
  text = (GOLDEN / name / "expected.json").read_text(encoding="utf-8")
  expected = json.loads(text)
  want = np.array(expected.pop("logits"))
  batch = {k: jnp.asarray(v, jnp.int32) for k, v in expected.items()}
  model, loaded = load(GOLDEN / name, labels=want.shape[1], scan=scan)
  assert loaded[1:] == ((), (), ())
  got = apply(model, loaded.params, **batch)[:, 0]
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.ptp(want, axis=0).min() > 0.1  # the rows do differ


@pytest.mark.parametrize("scan", rest_is_slow([True, False]))
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_exact(name, scan, load):
  original = load_file(GOLDEN / name / "model.safetensors")
  stored = next(iter(original.values())).dtype
  labels = 1 if "regression" in name else 3
  model, loaded = load(
    GOLDEN / name, labels=labels, scan=scan, param_dtype=stored
  )
  tensors = to_hf(loaded.params, model.config)
  assert tensors.keys() == original.keys()
  for key, value in tensors.items():
    assert value.dtype == stored and value.shape == original[key].shape
    assert value.tobytes() == original[key].tobytes(), key
  assert all(value.flags.c_contiguous for value in tensors.values())


def test_to_hf_refuses_what_is_no_parameter(load):
  model, loaded = load(BERT)
  loaded.params["classifier"]["d"] = np.zeros(3)
  with pytest.raises(ValueError, match="classifier/d"):
    to_hf(loaded.params, model.config)


def test_types_are_the_templates_unless_given(load, shapes):
  _, loaded = load(GOLDEN / "bert_regression", labels=1)
  assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype("f4")}
  config = load_config(BERT)
  low = BertClassifier(config, 3, param_dtype=jnp.bfloat16)
  params = load_params(BERT, shapes(low)).params
  assert params["classifier"]["kernel"].dtype == np.float32
  assert params["pooler"]["dense"]["kernel"].dtype == ml_dtypes.bfloat16


@SCAN
def test_a_bare_or_legacy_encoder_loads_alike(scan, copy, load):
  tensors = {
    name.removeprefix("bert.")
    .replace("LayerNorm.weight", "LayerNorm.gamma")
    .replace("LayerNorm.bias", "LayerNorm.beta"): value
    for name, value in load_file(BERT / "model.safetensors").items()
  }
  _, loaded = load(copy(tensors), scan=scan)
  _, want = load(BERT, scan=scan)
  assert loaded[1:] == ((), (), ())
  jax.tree.map(np.testing.assert_array_equal, loaded.params, want.params)


@SCAN
def test_shards_load_like_one_file(scan, tmp_path, load):
  tensors = list(load_file(BERT / "model.safetensors").items())
  index = {}
  for part in (0, 1):
    file = f"model-0000{part + 1}-of-00002.safetensors"
    save_file(dict(tensors[part::2]), tmp_path / file)
    index |= dict.fromkeys(dict(tensors[part::2]), file)
  (tmp_path / "config.json").write_bytes((BERT / "config.json").read_bytes())
  text = json.dumps({"metadata": {}, "weight_map": index})
  (tmp_path / "model.safetensors.index.json").write_text(text)
  _, loaded = load(tmp_path, scan=scan)
  _, want = load(BERT, scan=scan)
  assert loaded[1:] == ((), (), ())
  jax.tree.map(np.testing.assert_array_equal, loaded.params, want.params)

  (tmp_path / file).unlink()
  with pytest.raises(UserError, match="model-00002-of-00002.*missing"):
    load(tmp_path, scan=scan)


def test_what_finds_no_partner_is_reported(copy, load):
  tensors = load_file(BERT / "model.safetensors")
  del tensors["classifier.weight"], tensors["bert.pooler.dense.bias"]
  extra = [
    "bert.embeddings.position_ids",
    "cls.predictions.bias",
    "bert.encoder.layer.3.output.dense.bias",
    "regression_head.weight",
  ]
  tensors |= {name: np.zeros(2, np.float32) for name in extra}
  _, loaded = load(copy(tensors))
  assert loaded.missing == ("classifier/kernel", "pooler/dense/bias")
  assert loaded.unexpected == tuple(sorted(extra[2:]))
  assert loaded.dropped == tuple(extra[:2])
  assert "kernel" not in loaded.params["classifier"]
  assert "bias" in loaded.params["classifier"]


def test_robertas_unused_pooler_is_dropped(copy, load):
  folder = GOLDEN / "roberta_three_labels"
  tensors = load_file(folder / "model.safetensors")
  extra = ["lm_head.bias", "roberta.pooler.dense.bias"]
  tensors |= {name: np.zeros(2, np.float32) for name in extra}
  _, loaded = load(copy(tensors, folder / "config.json"))
  assert loaded[1:] == ((), (), tuple(extra))


def test_a_stack_with_a_hole_is_refused(copy, load):
  tensors = load_file(BERT / "model.safetensors")
  del tensors["bert.encoder.layer.1.output.dense.bias"]
  with pytest.raises(UserError, match="encoder.layer.1.output.dense.bias"):
    load(copy(tensors))
  _, loaded = load(copy(tensors), scan=False)
  assert loaded.missing == ("encoder/layer_1/output/dense/bias",)


@SCAN
def test_a_wrong_shape_names_tensor_and_shapes(scan, load):
  with pytest.raises(UserError) as caught:
    load(BERT, labels=2, scan=scan)
  for words in ("'classifier.", "(3", "(2"):
    assert words in str(caught.value)


DENSE = "bert.encoder.layer.1.intermediate.dense.weight"
POOLER = "bert.pooler.dense.weight"


@pytest.mark.parametrize(
  "name, change, words",
  [
    (DENSE, lambda x: x.T.copy(), r"layer\.1\.inter.*24, 48.*48, 24"),
    (POOLER, lambda x: x.astype(np.int8), "I8.*unquantised"),
    ("pooler.dense.bias", lambda x: np.zeros(24, np.float32), "holds both"),
  ],
)
def test_a_tensor_that_does_not_fit_is_named(name, change, words, copy, load):
  tensors = load_file(BERT / "model.safetensors")
  tensors[name] = change(tensors.get(name))
  with pytest.raises(UserError, match=words):
    load(copy(tensors))


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_file_is_refused(keep, copy, load):
  folder = copy(load_file(BERT / "model.safetensors"))
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(UserError, match="no whole safetensors file"):
    load(folder)


def test_pickled_weights_are_refused_with_a_way_out(copy, load):
  folder = copy({})
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(UserError, match="weights_only=True.*model.safetensors"):
    load(folder)


def test_other_folders_are_refused(copy, load, tmp_path):
  with pytest.raises(UserError, match="config.model.name"):
    load_config(tmp_path)
  folder = copy({})
  (folder / "model.safetensors").unlink()
  with pytest.raises(UserError, match="neither model.safetensors"):
    load(folder)
  (folder / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(UserError, match="no weight_map"):
    load(folder)
  (folder / "config.json").write_text("[]")
  with pytest.raises(UserError, match="not a JSON object"):
    load_config(folder)
  (folder / "config.json").write_text("{")
  with pytest.raises(UserError, match="read as JSON"):
    load_config(folder)
