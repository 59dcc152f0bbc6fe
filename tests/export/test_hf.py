"""Merged folders: the same answers, whole or not there at all."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.slow import rest_is_slow
from vera_jax.adapters.files import load_adapter
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.export.hf import BOUNDS, merged_params, write_merged
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import fingerprint
from vera_jax.pretrained.blueprint import blueprint, load_model
from vera_jax.pretrained.classifier import load_classifier, restore_adapter
from vera_jax.pretrained.sharding import make_mesh
from vera_jax.serve.predictor import Predictor

FIRST = ["word1 word2 word3", "word9", "word4 word4 word20 word7"]
SECOND = ["word5", "word8 word1", "word0"]


def restored(folder):
  return restore_adapter(load_adapter(folder))


@pytest.mark.parametrize(
  "method", rest_is_slow(["vera", "dvora+ia3", "bitfit", "full"])
)
def test_the_folder_answers_as_the_adapter_does(
  method, random_adapter, tmp_path
):
  adapted = restored(random_adapter(method))
  before = fingerprint(adapted.folder)
  about = write_merged(adapted, tmp_path / "out")
  merged = load_classifier(tmp_path / "out")
  ours, theirs = (
    Predictor(model).logits(FIRST, SECOND) for model in (adapted, merged)
  )
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
  assert merged.labels == adapted.labels
  assert merged.about == json.loads((tmp_path / "out/merge.json").read_text())
  assert merged.about == about
  assert about["differences"]["float32"] <= 1e-5
  assert fingerprint(adapted.folder) == before  # unmerged is the base itself
  assert about["base"] == str(adapted.folder)
  assert about["base_fingerprint"] == before
  assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.slow
def test_roberta_and_regression(random_adapter, tiny_roberta, tmp_path):
  adapted = restored(random_adapter(base=tiny_roberta, task="stsb"))
  write_merged(adapted, tmp_path / "out")
  fields = json.loads((tmp_path / "out/config.json").read_text())
  assert fields["architectures"] == ["RobertaForSequenceClassification"]
  assert fields["problem_type"] == "regression"
  assert fields["id2label"] == {"0": "LABEL_0"}
  assert load_classifier(tmp_path / "out").labels == ()


def test_half_the_bytes_nearly_the_answers(random_adapter, tmp_path):
  dtype = "bfloat16"
  adapted = restored(random_adapter())
  about = write_merged(adapted, tmp_path / "out", dtype=dtype)
  assert list(about["differences"]) == ["float32", dtype]
  assert about["differences"]["float32"] < about["differences"][dtype]
  fields = json.loads((tmp_path / "out/config.json").read_text())
  assert fields["dtype"] == dtype
  assert fields["id2label"] == {"0": "entailment", "1": "not_entailment"}
  assert fields["label2id"] == {"entailment": 0, "not_entailment": 1}
  file = tmp_path / "out/model.safetensors"
  with safe_open(file, framework="numpy") as weights:
    assert weights.metadata() == {"format": "pt"}
    numbers = sum(weights.get_tensor(name).size for name in weights.keys())
  assert 2 * numbers < file.stat().st_size < 2 * numbers + 8192


def test_past_the_bound_nothing_is_written(random_adapter, tmp_path):
  adapted = restored(random_adapter())
  with pytest.raises(UserError, match="bfloat16 .* past the bound"):
    write_merged(
      adapted,
      tmp_path / "out",
      dtype="bfloat16",
      bounds={**BOUNDS, "bfloat16": 1e-9},
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_too_large_for_the_type_are_refused(random_adapter, tmp_path):
  adapted = restored(random_adapter())
  kernel = adapted.params["classifier"]["kernel"]
  adapted.params["classifier"]["kernel"] = jnp.full_like(kernel, 1e6)
  with pytest.raises(UserError, match="float16 .* past the bound"):
    write_merged(adapted, tmp_path / "out", dtype="float16")


def test_weights_that_are_no_numbers_are_refused(random_adapter, tmp_path):
  adapted = restored(random_adapter())
  query = adapted.params["encoder"]["layer"]["attention"]["self"]["query"]
  query["vera_b"] = jnp.full_like(query["vera_b"], 3e38)
  with pytest.raises(UserError, match="not a finite number for"):
    write_merged(adapted, tmp_path / "out")
  adapted = restored(random_adapter("head"))
  bias = adapted.params["classifier"]["bias"]
  adapted.params["classifier"]["bias"] = jnp.full_like(bias, jnp.inf)
  with pytest.raises(UserError, match="merged .*classifier.* are not finite"):
    write_merged(adapted, tmp_path / "out")
  assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(random_adapter, tmp_path):
  adapted = restored(random_adapter("head"))
  (tmp_path / "note").write_text("mine")
  for place in (tmp_path, tmp_path / "note"):
    with pytest.raises(UserError, match="is there already"):
      write_merged(adapted, place)
  with pytest.raises(UserError, match="dtype is 'int8'.*not quantised aga"):
    write_merged(adapted, tmp_path / "out", dtype="int8")
  assert (tmp_path / "note").read_text() == "mine"
  (tmp_path / "out").mkdir()
  write_merged(adapted, tmp_path / "out")
  assert (tmp_path / "out/model.safetensors").is_file()


def test_a_merged_folder_is_a_model_to_train(random_adapter, tmp_path):
  adapted = restored(random_adapter())
  write_merged(adapted, tmp_path / "out")
  plan = blueprint(read_fields(tmp_path / "out"), outputs=2)
  model = load_model(plan, tmp_path / "out", mesh=make_mesh(), seed=0)
  assert model.notes == ()  # no weight is new, none is left over
  np.testing.assert_array_equal(
    model.trainable["classifier"]["kernel"],
    adapted.params["classifier"]["kernel"],
  )


def test_a_broken_merge_json_is_named(random_adapter, tmp_path):
  write_merged(restored(random_adapter("head")), tmp_path / "out")
  (tmp_path / "out/merge.json").write_text("{")
  with pytest.raises(UserError, match="merge.json can't be read"):
    load_classifier(tmp_path / "out")
  (tmp_path / "out/merge.json").write_text('{"max_length": "5"}')
  with pytest.raises(UserError, match="max_length is '5'"):
    load_classifier(tmp_path / "out")


@pytest.mark.slow
def test_a_real_encoder(random_adapter, minilm_folder, tmp_path):
  """MiniLM with random d and b: far from the base, merged to the same."""
  adapted = restored(random_adapter(base=minilm_folder, rank=64))
  about = write_merged(adapted, tmp_path / "out")
  assert about["differences"]["float32"] <= about["bounds"]["float32"]
  query = ("encoder", "layer", "attention", "self", "query", "kernel")
  before, after = (
    np.asarray(flatten_dict(params)[query])
    for params in (adapted.params, merged_params(adapted))
  )
  assert np.abs(before - after).max() > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize(
  "kind, method", [("bert", "lora"), ("roberta", "vera")]
)
def test_torch_gives_the_same_logits(
  kind, method, random_adapter, tiny_model, tiny_roberta, tmp_path
):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  base = {"bert": tiny_model, "roberta": tiny_roberta}[kind]
  adapted = restored(random_adapter(method, base=base))
  write_merged(adapted, tmp_path / "out")
  auto = transformers.AutoModelForSequenceClassification
  model, loading = auto.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(loading.values()), loading
  assert model.config.id2label == dict(enumerate(adapted.labels))
  tokenizer = load_tokenizer(tmp_path / "out")
  inputs = tokenizer(FIRST, SECOND, padding=True, return_tensors="pt")
  with torch.no_grad():
    theirs = model.eval()(**inputs).logits.numpy()
  ours = Predictor(adapted).logits(FIRST, SECOND)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
  assert np.ptp(theirs) > 1e-2


def test_a_damaged_base_is_named(random_adapter, tiny_model, tmp_path):
  folder = shutil.copytree(tiny_model, tmp_path / "base")
  saved = load_adapter(random_adapter())
  stored = load_file(folder / "model.safetensors")
  stored.pop("bert.encoder.layer.1.output.dense.weight")
  save_file(stored, folder / "model.safetensors")
  saved.about["base_fingerprint"] = fingerprint(folder)
  with pytest.raises(UserError, match="lacks 1 of the network.*layer_1/output"):
    restore_adapter(saved, folder)
