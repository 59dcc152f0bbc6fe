"""One label per leaf: what each method trains, split, join and counts."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.base_leaves import bitfit
from vera_jax.adapters.labels import (
  ADAPTER,
  FROZEN,
  HEAD,
  Counts,
  count,
  join,
  label_tree,
  split,
)
from vera_jax.adapters.lora import lora
from vera_jax.adapters.methods import METHODS
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError
from vera_jax.models.bert import BertClassifier, BertConfig

ADAPTERS = {"vera": vera(4), "lora": lora(2)}
SELF = [f"encoder/{layer}/attention/self" for layer in ("layer", "layer_1")]
LEAVES = {
  "vera": lambda layer, leaf: leaf in ("vera_d", "vera_b"),
  "lora": lambda layer, leaf: leaf in ("lora_A", "lora_B"),
  "bitfit": lambda layer, leaf: leaf == "bias",
  "norms": lambda layer, leaf: layer == "LayerNorm",
  "head": lambda layer, leaf: False,
}
HEADS = {
  "bert": {"classifier/kernel", "classifier/bias"},
  "roberta": {
    f"classifier/{layer}/{leaf}"
    for layer in ("dense", "out_proj")
    for leaf in ("kernel", "bias")
  },
}
FAMILIES = pytest.mark.parametrize("family", HEADS)


@cache
def shapes_of(family, method):
  config = BertConfig.from_dict(
    {
      "model_type": family,
      "vocab_size": 20,
      "hidden_size": 8,
      "num_hidden_layers": 2,
      "num_attention_heads": 2,
      "intermediate_size": 12,
      "max_position_embeddings": 10,
    }
  )
  model = BertClassifier(config, 3)
  if method in ADAPTERS:
    model = adapt(model, ADAPTERS[method], targets=["query", "value"])
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), ids)["params"]


def names(labels, label):
  flat = flatten_dict(labels, sep="/")
  return {name for name, value in flat.items() if value == label}


def leaves_of(family, method):
  """A method's own leaves, the head's left out."""
  paths = flatten_dict(shapes_of(family, method))
  return {
    "/".join(path)
    for path in paths
    if path[0] != "classifier" and LEAVES[method](*path[-2:])
  }


@FAMILIES
@pytest.mark.parametrize("method", LEAVES)
def test_what_a_method_trains(method, family):
  labels = label_tree(shapes_of(family, method), method)
  own = leaves_of(family, method)
  assert names(labels, ADAPTER) == own and (own or method == "head")
  assert names(labels, HEAD) == HEADS[family]


@FAMILIES
def test_full_trains_everything_and_counts_the_head_apart(family):
  labels = label_tree(shapes_of(family, "full"), "full")
  assert not names(labels, FROZEN)
  assert names(labels, HEAD) == HEADS[family]


def test_a_new_leaf_is_trained_with_the_head():
  """First rule wins: head, then the adapter's own, then what is new."""
  shapes = shapes_of("bert", "vera")
  new = [path for path in flatten_dict(shapes) if path[0] == "pooler"]
  new += [
    path for path in flatten_dict(shapes) if path[-1] in ("vera_d", "vera_b")
  ]
  labels = label_tree(shapes, "vera", new=new)
  pooler = {"pooler/dense/kernel", "pooler/dense/bias"}
  assert names(labels, HEAD) == HEADS["bert"] | pooler
  assert names(labels, ADAPTER) == leaves_of("bert", "vera")


def test_another_heads_name():
  labels = label_tree(shapes_of("bert", "head"), "head", head="pooler/.*")
  assert names(labels, HEAD) == {"pooler/dense/kernel", "pooler/dense/bias"}


def test_a_heads_pattern_that_matches_nothing_is_refused():
  """It is about whole paths. A decoder has no head of its own to name."""
  shapes = shapes_of("bert", "vera")
  for pattern in ("clasifier/.*", "classifier", "kernel"):
    with pytest.raises(
      UserError, match=rf"'{pattern}' .*(.|\n)*\n  classifier"
    ):
      label_tree(shapes, "vera", head=pattern)
  with pytest.raises(UserError, match="no proper regular expression"):
    label_tree(shapes, "vera", head="(classifier")
  headless = {k: x for k, x in shapes.items() if k != "classifier"}
  assert names(label_tree(headless, "vera"), ADAPTER) == leaves_of(
    "bert", "vera"
  )
  assert not names(label_tree(shapes, "vera", head=""), HEAD)


@pytest.mark.parametrize("method", METHODS)
def test_join_undoes_split(method):
  shapes = shapes_of("bert", method)
  labels = label_tree(shapes, method)
  trainable, frozen = split(shapes, labels)
  assert not flatten_dict(trainable).keys() & flatten_dict(frozen).keys()
  assert join(trainable, frozen) == join(frozen, trainable) == shapes


def test_counts():
  """Two layers of width 8, rank 4, three labels."""
  shapes = shapes_of("bert", "vera")
  base = sum(x.size for x in jax.tree.leaves(shapes_of("bert", "head")))
  head = 8 * 3 + 3
  assert count(shapes, label_tree(shapes, "vera")) == Counts(
    adapter=2 * 2 * (8 + 4), head=head, frozen=base - head
  )


def test_bitfit_of_some_layers():
  shapes = shapes_of("bert", "bitfit")
  labels = label_tree(shapes, bitfit(biases="query|value"))
  own = {f"{self}/{q}/bias" for self in SELF for q in ("query", "value")}
  assert names(labels, ADAPTER) == own
  with pytest.raises(UserError, match="the model has none"):
    label_tree(shapes, bitfit(biases="qury"))


def test_an_unknown_method_is_refused():
  with pytest.raises(UserError, match="'other'.*vera, lora, ia3"):
    label_tree({}, "other")
