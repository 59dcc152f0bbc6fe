"""Saved adapters back on their base; what differs is named."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vera_jax.adapters.files import load_adapter, tensors
from vera_jax.adapters.labels import label_tree, split
from vera_jax.adapters.projections import digest
from vera_jax.errors import UserError
from vera_jax.models.bert import BertClassifier
from vera_jax.models.classifier import load_classifier, restore_adapter
from vera_jax.models.hf_weights import load_params

CHAINS = ("dvora+ia3", "vera+bitfit")
METHODS = ("vera", "lora", "bitfit", "head", "full", *CHAINS)
IDS = np.array([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]], np.int32)


def logits(classifier):
  apply = jax.jit(classifier.module.apply)
  return np.asarray(apply(classifier.variables, jnp.asarray(IDS)))


@pytest.mark.parametrize(
  "method, scan",
  [*((method, True) for method in METHODS), ("vera", False)],
)
def test_what_was_saved_is_in_the_tree(method, scan, random_adapter):
  saved = load_adapter(random_adapter(method))
  classifier = restore_adapter(saved, scan=scan)
  labels = label_tree(classifier.params, method)
  trained, frozen = split(classifier.params, labels)
  found = tensors(trained)
  assert found.keys() == saved.tensors.keys()
  for name, value in saved.tensors.items():
    np.testing.assert_array_equal(found[name], value)
  shapes = jax.eval_shape(lambda: frozen)
  base = load_params(classifier.folder, shapes).params
  jax.tree.map(np.testing.assert_array_equal, frozen, base)
  if method == "vera":
    assert digest(classifier.projections) == saved.about["projection_digest"]
  assert classifier.labels == ("entailment", "not_entailment")


@pytest.mark.parametrize(
  "sharing, trained_scan", [("shared", True), ("unique", False)]
)
def test_scanned_or_looped_serves_any_adapter(
  sharing, trained_scan, random_adapter
):
  folder = random_adapter(sharing=sharing, scan=trained_scan)
  one, two = (
    logits(restore_adapter(load_adapter(folder), scan=scan))
    for scan in (True, False)
  )
  np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


def test_the_adapter_does_something(random_adapter):
  classifier = restore_adapter(load_adapter(random_adapter()))
  base = jax.jit(BertClassifier(classifier.config, 2).apply)
  trained, frozen = split(
    classifier.params, label_tree(classifier.params, "vera")
  )
  plain = {**frozen, "classifier": trained["classifier"]}
  without = base({"params": plain}, jnp.asarray(IDS))
  assert np.abs(logits(classifier) - without).max() > 1e-2


def test_the_frozen_leaves_take_the_type(random_adapter):
  saved = load_adapter(random_adapter())
  classifier = restore_adapter(saved, dtype=jnp.bfloat16)
  query = classifier.params["encoder"]["layer"]["attention"]["self"]["query"]
  assert query["kernel"].dtype == jnp.bfloat16
  assert query["vera_d"].dtype == jnp.float32
  exact = logits(restore_adapter(saved))
  np.testing.assert_allclose(logits(classifier), exact, rtol=0, atol=0.1)


def test_a_regression_adapter_has_one_output(random_adapter):
  classifier = restore_adapter(load_adapter(random_adapter(task="stsb")))
  assert classifier.labels == () and logits(classifier).shape == (2, 1, 1)


@pytest.fixture
def other_base(tiny_model, tmp_path):
  """The same model with one weight a little different."""
  folder = shutil.copytree(tiny_model, tmp_path / "other")
  stored = load_file(folder / "model.safetensors")
  stored["bert.pooler.dense.bias"][0] += 1e-3
  save_file(stored, folder / "model.safetensors")
  return folder


def test_another_base_is_refused(other_base, random_adapter):
  with pytest.raises(UserError, match="another base than .*other"):
    restore_adapter(load_adapter(random_adapter()), other_base)


def test_a_base_that_moved_can_be_named(tiny_model, random_adapter, tmp_path):
  saved = load_adapter(random_adapter())
  saved.about["base"] = "/gone/away"
  with pytest.raises(UserError, match="'/gone/away' .* name its folder"):
    restore_adapter(saved)
  moved = shutil.copytree(tiny_model, tmp_path / "moved")
  assert restore_adapter(saved, moved).folder == moved


@pytest.mark.parametrize(
  "about, settings, words",
  [
    ({}, {"rank": 4}, r"vera_d has shape \(8,\), not \(4,\).*: are rank"),
    ({}, {"targets": ["query", "value", "key"]}, "no encoder.*key.vera_d"),
    ({}, {"targets": ["query"]}, "no place for .*value.vera_b"),
    ({}, {"targets": ["kye"]}, "'kye'"),
    ({}, {"train": "d"}, "no place for .*vera_b"),
    (
      {"labels": ["a", "b", "c"]},
      {},
      r"has shape \(.*2.*: are rank and labels",
    ),
    ({"method": "lora"}, {"alpha": 1.0}, "no .*lora_A"),
    ({"method": "dora"}, {}, "method is 'dora'"),
    ({}, {"projection_seed": 1}, "come out different .* digest"),
    ({}, {"init": "uniform"}, "come out different"),
    ({"projection_digest": "0" * 64}, {}, "not 000000000000"),
    ({"projection_prng": "rbg"}, {}, "generator 'rbg'"),
  ],
)
def test_what_differs_is_named(about, settings, words, random_adapter):
  saved = load_adapter(random_adapter())
  saved.about.update(about)
  saved.about["settings"].update(settings)
  with pytest.raises(UserError, match=f"(?s){words}"):
    restore_adapter(saved)


def test_an_encoder_alone_is_no_classifier(tiny_model):
  with pytest.raises(UserError, match="lacks classifier/bias"):
    load_classifier(tiny_model)


def test_labels_are_those_of_the_config(tiny_model, tmp_path):
  folder = shutil.copytree(tiny_model, tmp_path / "odd")
  fields = json.loads((folder / "config.json").read_text())
  fields["id2label"] = {"zero": "a"}
  (folder / "config.json").write_text(json.dumps(fields))
  with pytest.raises(UserError, match="no usable id2label"):
    load_classifier(folder)
