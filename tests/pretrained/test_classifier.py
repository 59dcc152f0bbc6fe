"""Saved adapters back on their base; what differs is named."""

import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from tests.models.decoders import GPT2, LLAMA
from tests.models.test_families import random_params
from tests.models.test_hf_weights import BERT
from tests.slow import rest_is_slow
from vera_jax.adapters.files import load_adapter, tensors
from vera_jax.adapters.labels import label_tree, split
from vera_jax.adapters.projections import digest
from vera_jax.errors import UserError
from vera_jax.models.bert import BertClassifier
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params, to_hf
from vera_jax.models.kinds import kind_of
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import load_classifier, restore_adapter

METHODS = ("vera", "unilora", "head", "full", "vera+bitfit")
HEAD = "language_modelling"
IDS = np.array([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]], np.int32)


def logits(classifier):
  apply = jax.jit(classifier.module.apply)
  return np.asarray(apply(classifier.variables, jnp.asarray(IDS)))


@pytest.mark.parametrize(
  "method, scan",
  rest_is_slow([*((method, True) for method in METHODS), ("vera", False)]),
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


def test_a_model_is_traced_once(random_adapter):
  """Initialised and called: for sites, shapes and plans alike, at each size."""
  classifier, traced = restore_adapter(load_adapter(random_adapter())), []

  def note(next_fun, args, kwargs, context):
    if isinstance(context.module, BertClassifier):
      traced.append(context.method_name == "__call__")
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(note):
    for _ in range(2):
      plan = blueprint(
        read_fields(classifier.folder),
        outputs=2,
        adapter=(classifier.adapter, ("query", "value")),
        sizes=(32, 16, 2),
      )
      assert set(plan.plans) == set(classifier.targets)
      assert sum(traced) == 2
  inner, last = ("encoder", "layer"), ("encoder", "layer_1")
  query = ("attention", "self", "query")
  assert plan.tokens[*inner, *query] == 32 * 16
  assert plan.tokens[*last, *query] == 32 * 2  # where the head reads


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


@pytest.mark.parametrize("kind", ["tags", ["tags"], "regression"])
def test_a_kind_that_is_not_there_or_does_not_fit(kind):
  with pytest.raises(UserError, match="A kind is one of"):
    kind_of({"kind": kind}, ["a", "b"])


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
  rest_is_slow(
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
      ({"method": "lora"}, {"alpha": 1.0, "scaling": "rank"}, "no .*lora_A"),
      ({"method": "other"}, {}, "method is 'other'"),
      ({}, {"projection_seed": 1}, "come out different .* digest"),
      ({}, {"init": "uniform"}, "come out different"),
      ({"projection_digest": "0" * 64}, {}, "not 000000000000"),
      ({"projection_prng": "rbg"}, {}, "generator 'rbg'"),
      ({}, {"projection_seed": 10**30}, "no usable projection_seed=1000000"),
      ({}, {"projection_seed": -(2**31) - 1}, "projection_seed is -2147483649"),
      ({}, {"rank": 10**30}, "no usable rank=1000000"),
      ({}, {"d_init": float("inf")}, "no usable d_init=inf"),
      ({"method": "lora"}, {"alpha": float("nan")}, "no usable alpha=nan"),
      ({"method": "lora"}, {"alpha": 10**400}, "no usable alpha=1000000"),
      ({}, {"targets": ["((.|[a-z/_])+)+[QX]"]}, "takes too long|no layer"),
      ({}, {"targets": ["que("]}, "no proper regular expression"),
      ({"base": "package:no_package.sub/model"}, {}, "is not installed"),
    ],
    quick=8,
  ),
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


@pytest.mark.parametrize("said", [True, None])
@pytest.mark.parametrize(
  "kind", rest_is_slow(["gpt2", "llama", "mistral", "qwen2", "qwen3"])
)
def test_an_output_layer_of_its_own_is_used_whatever_config_says(
  kind, said, tmp_path, caplog
):
  """As in transformers; the same numbers a second time change nothing."""
  base = {**(GPT2 if kind == "gpt2" else LLAMA), "model_type": kind}
  plan = blueprint(
    {**base, "tie_word_embeddings": False}, outputs=0, head=HEAD, scan=False
  )
  params = random_params(unflatten_dict(plan.shapes))
  held = to_hf(params, plan.config)
  fields = base if said is None else {**base, "tie_word_embeddings": said}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  save_file(held, tmp_path / "model.safetensors")
  loaded = load_classifier(tmp_path, scan=False)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  ties = said or kind == "gpt2"
  assert ("which is used" in caplog.text) == ties

  table = next(name for name in held if re.search(r"wte|embed_tokens", name))
  held["lm_head.weight"] = held[table]
  save_file(held, tmp_path / "model.safetensors")
  caplog.clear()
  loaded = load_classifier(tmp_path, scan=False)
  assert ("lm_head" in loaded.params) != ties
  assert not caplog.text

  held["lm_head.bias"] = np.ones(50, np.float32)
  save_file(held, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match="no place for its tensors lm_head.bias"):
    load_classifier(tmp_path, scan=False)


@pytest.mark.parametrize(
  "changes, extra, words",
  [
    ({"architectures": ["BertForMultipleChoice"]}, "", "is a BertForMultiple"),
    ({"problem_type": "ranking"}, "", "problem_type is 'ranking'"),
    ({}, "crf.transitions", "no place for its tensors crf.transitions"),
    ({}, "cls.predictions.bias", None),
    ({"architectures": ["BertForMaskedLM", "BertForSequenceClassification"]},)
    + ("", None),
  ],
)
def test_another_network_than_config_says_is_refused(
  changes, extra, words, tmp_path
):
  held = load_file(BERT / "model.safetensors")
  fields = json.loads((BERT / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
  if extra:
    held[extra] = np.zeros(3, np.float32)
  save_file(held, tmp_path / "model.safetensors")
  if words is None:
    assert load_classifier(tmp_path, scan=False).kind == "classification"
  else:
    with pytest.raises(UserError, match=words):
      load_classifier(tmp_path, scan=False)
