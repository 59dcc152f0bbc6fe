"""The encoder's tree, packing, stacking, dropout and refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import rest_is_slow
from vera_jax.errors import UserError
from vera_jax.models.bert import BertClassifier


def loop(params):
  """A scanned tree as the looped model names it."""
  layers = dict(params["encoder"])
  stacked = layers.pop("layer")
  for i in range(len(jax.tree.leaves(stacked)[0])):
    layers[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
  return {**params, "encoder": layers}


@partial(jax.jit, static_argnums=1)
@jax.value_and_grad
def squares(params, model, ids):
  return jnp.sum(jnp.square(model.apply({"params": params}, ids)))


@pytest.fixture(scope="module")
def scanned(tiny, init, ids):
  """A scanned model's config, parameters, value and gradients."""
  model = BertClassifier(tiny("roberta"), 3)
  params = init(model)
  return model.config, params, *squares(params, model, ids)


@pytest.mark.parametrize(
  "scan, remat",
  rest_is_slow(
    [(False, "none"), (True, "full"), (True, "dots"), (False, "full")], quick=2
  ),
)
def test_stacking_and_remat_change_nothing(scan, remat, scanned, ids):
  config, params, value_wanted, grads_wanted = scanned
  model = BertClassifier(config, 3, scan=scan, remat=remat)
  reshape = (lambda tree: tree) if scan else loop
  value, grads = squares(reshape(params), model, ids)
  np.testing.assert_allclose(value, value_wanted, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    grads,
    reshape(grads_wanted),
  )


@pytest.mark.parametrize("kind", rest_is_slow(["bert", "roberta"]))
@pytest.mark.parametrize(
  "scan, remat", rest_is_slow([(True, "full"), (False, "none")])
)
def test_dropout_follows_its_key(kind, scan, remat, tiny, init, apply, ids):
  model = BertClassifier(tiny(kind), 3, scan=scan, remat=remat)
  params = init(model)

  def run(seed, **options):
    return apply(model, params, ids, key=jax.random.key(seed), **options)

  first, again, other = (run(s, deterministic=False) for s in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-4
  np.testing.assert_array_equal(run(0), run(1))


RATES = (
  "hidden_dropout_prob",
  "attention_probs_dropout_prob",
  "classifier_dropout",
)


@pytest.mark.parametrize("kind", rest_is_slow(["roberta", "bert"]))
@pytest.mark.parametrize("active", RATES)
def test_each_dropout_rate_is_used(kind, active, tiny, init, apply, ids):
  rates = dict.fromkeys(RATES, 0.0)
  model = BertClassifier(tiny(kind, **{**rates, active: 0.5}), 3)
  quiet = BertClassifier(tiny(kind, **rates), 3)
  params = init(model)
  options = {"deterministic": False, "key": jax.random.key(0)}
  want = apply(quiet, params, ids)
  same = apply(quiet, params, ids, **options)
  np.testing.assert_allclose(same, want, atol=1e-6)
  dropped = apply(model, params, ids, **options)
  assert np.abs(dropped - want).max() > 1e-3


def test_classifier_dropout_falls_back_to_the_hidden_rate(
  tiny, init, apply, ids
):
  changes = {"hidden_dropout_prob": 0.9, "num_hidden_layers": 1}
  config = tiny(**changes, classifier_dropout=None)
  same = tiny(**changes, classifier_dropout=0.9)
  params = init(BertClassifier(config, 3))
  options = {"deterministic": False, "key": jax.random.key(0)}
  one, two = (
    apply(BertClassifier(c, 3), params, ids, **options) for c in (config, same)
  )
  np.testing.assert_array_equal(one, two)


def test_layers_heads_and_rows_draw_their_own_dropout(tiny, init, ids):
  config = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
  model = BertClassifier(config, 3)
  params = jax.tree.map(jnp.zeros_like, init(model))
  values = params["encoder"]["layer"]["attention"]["self"]["value"]
  values["bias"] = jnp.ones_like(values["bias"])  # so context sums the probs

  @jax.jit
  def contexts(params):
    _, state = model.apply(
      {"params": params},
      ids,
      deterministic=False,
      rngs={"dropout": jax.random.key(0)},
      capture_intermediates=lambda module, _: module.name == "self",
      mutable=["intermediates"],
    )
    return state["intermediates"]["encoder"]["layer"]["attention"]["self"]

  context = np.asarray(contexts(params)["__call__"][0])
  assert context.shape == (2, 2, 8, 16)  # layers, rows, length, hidden
  assert np.abs(context[0] - context[1]).max() > 0.1
  assert np.abs(context[0, 0] - context[0, 1]).max() > 0.1
  assert np.abs(context[..., :8] - context[..., 8:]).max() > 0.1


def test_param_dtype_spares_the_head(tiny, shapes):
  tree = shapes(BertClassifier(tiny("roberta"), 3, param_dtype=jnp.bfloat16))
  head = tree.pop("classifier")
  assert {leaf.dtype for leaf in jax.tree.leaves(head)} == {jnp.dtype("f4")}
  assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.bfloat16.dtype}


def test_positions_past_the_table_give_nan(tiny, init, apply):
  model = BertClassifier(tiny("roberta"), 3)  # 20 rows, two of them offset
  params = init(model)
  last, past = (jnp.full((1, n), 7, jnp.int32) for n in (18, 19))
  assert jnp.isfinite(apply(model, params, last)).all()
  assert jnp.isnan(apply(model, params, past)).all()


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
    ({"model_type": None}, "model_type is None"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ({"hidden_act": ["gelu"]}, "hidden_act"),
    ({"is_decoder": True}, "is_decoder is True"),
    ({"hidden_size": 15}, "hidden_size 15 does not divide"),
    ({"hidden_size": "16"}, "no usable hidden_size"),
    ({"vocab_size": None, "hidden_size": 1.5}, "vocab_size, hidden_size"),
    ({"pad_token_id": None}, "no usable pad_token_id"),
  ],
)
def test_what_is_not_supported_is_named(changes, words, tiny):
  with pytest.raises(UserError, match=words):
    tiny(**changes)
