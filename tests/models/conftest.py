"""A model small enough to compile in a second, and a batch for it."""

from functools import partial

import jax
import numpy as np
import pytest

from vera_jax.models.bert import FIELDS, BertClassifier, BertConfig


@pytest.fixture(scope="session")
def tiny():
  """Makes the config of a two-layer model; keywords change fields."""

  def make(kind="bert", **changes) -> BertConfig:
    fields = {
      "model_type": kind,
      "vocab_size": 50,
      "hidden_size": 16,
      "num_hidden_layers": 3,
      "num_attention_heads": 2,
      "intermediate_size": 32,
      "max_position_embeddings": 20,
      **changes,
    }
    return BertConfig.from_dict(FIELDS.take(fields))

  return make


@pytest.fixture(scope="session")
def ids() -> jax.Array:
  """Two rows of eight tokens, without padding in either family."""
  numbers = np.random.default_rng(0).integers(5, 50, (2, 8))
  return jax.numpy.asarray(numbers, jax.numpy.int32)


@pytest.fixture(scope="session")
def apply():
  """The compiled forward pass; with a key and not deterministic, dropout."""

  @partial(jax.jit, static_argnums=0, static_argnames="deterministic")
  def run(model, params, *args, key=None, deterministic=True, **arrays):
    rngs = None if key is None else {"dropout": key}
    options = {"deterministic": deterministic, "rngs": rngs}
    return model.apply({"params": params}, *args, **arrays, **options)

  return run


@pytest.fixture(scope="session")
def init(shapes):
  """Makes parameters with every leaf random, biases and norms included."""

  def make(model: BertClassifier) -> dict:
    rng = np.random.default_rng(0)

    def draw(path, leaf):
      noise = 0.2 * rng.standard_normal(leaf.shape)
      noise += path[-1].key == "scale"
      return jax.numpy.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes(model))

  return make


@pytest.fixture(scope="session")
def shapes(ids):
  """Makes the tree of shapes that load_params fills."""

  def make(model: BertClassifier) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), ids)["params"]

  return make
