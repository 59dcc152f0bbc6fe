"""Encoders: packing, stacking, windows, rotations, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.common import get_config
from tests.models.test_bert import loop
from vera_jax.adapters.interface import Site
from vera_jax.adapters.labels import join, split
from vera_jax.errors import UserError
from vera_jax.models.family import config_of, family_of
from vera_jax.pretrained.blueprint import blueprint

SIZES = {
  "vocab_size": 50,
  "max_position_embeddings": 20,
  "pad_token_id": 0,
}
FIELDS = {
  "distilbert": {
    **SIZES,
    "model_type": "distilbert",
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
  },
  "modernbert": {
    **SIZES,
    "model_type": "modernbert",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "local_attention": 4,
    "layer_types": ["full_attention", *["sliding_attention"] * 2],
  },
}
BERT = {
  **SIZES,
  "model_type": "bert",
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
}
CASES = {
  "bert": BERT,
  "roberta": {**BERT, "model_type": "roberta"},
  "distilbert": FIELDS["distilbert"],
  "modernbert": FIELDS["modernbert"],
  "mean": {
    **FIELDS["modernbert"],
    "layer_types": None,
    "global_attn_every_n_layers": 2,
    "classifier_pooling": "mean",
    "norm_bias": True,
  },
}
VERA = {
  "rank": 4,
  "d_init": 0.1,
  "init": "kaiming_uniform",
  "projection_seed": 0,
  "train": "both",
  "sharing": "shared",
  "conv": "whole",
  "targets": ["query", "value"],
}


def random_params(shapes):
  """Every leaf random, the same numbers for equal shapes."""
  rng = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(
      0.3 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale"),
      leaf.dtype,
    ),
    shapes,
  )


def build(case, **options):
  """(module, its random parameters, its projections), VeRA's leaves too."""
  plan = blueprint(
    CASES[case], outputs=3, method="vera", settings=VERA, **options
  )
  init = partial(plan.module.init, jax.random.key(0))
  params = random_params(jax.eval_shape(init, **plan.inputs)["params"])
  return plan, params, {"projections": plan.projections(params)}


def batches():
  """Texts of 9, 3 and 7 tokens, padded and packed, in the same shapes."""
  rng = np.random.default_rng(1)
  texts = [rng.integers(5, 50, n).tolist() for n in (9, 3, 7)]
  full = [t + [0] * (13 - len(t)) for t in texts]
  padded = {
    "input_ids": full,
    "positions": [list(range(13))] * 3,
    "segment_ids": [[int(i > 0) for i in row] for row in full],
    "cls_positions": [[0, 0]] * 3,
  }
  packed = {
    "input_ids": [texts[0] + texts[1] + [0], full[2], [0] * 13],
    "positions": [[*range(9), *range(3), 0], [*range(7), *[0] * 6], [0] * 13],
    "segment_ids": [[1] * 9 + [2] * 3 + [0], [1] * 7 + [0] * 6, [0] * 13],
    "cls_positions": [[0, 9], [0, 0], [0, 0]],
  }
  return [
    {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}
    for batch in (padded, packed)
  ]


@pytest.mark.parametrize(
  "kind, pad, first",
  [
    ("bert", 0, 0),
    *((k, 1, 2) for k in ("roberta", "xlm-roberta", "camembert")),
  ],
)
def test_padding_and_first_position_default_to_the_familys(kind, pad, first):
  fields = {**BERT, "model_type": kind}
  del fields["pad_token_id"]
  config, family = config_of(fields), family_of(fields)
  assert (config.pad_token_id, config.first_position) == (pad, first)
  assert family.room(config) == 20 - first


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_equal_padded_rows(case):
  plan, params, shared = build(case)
  variables, run = {"params": params, **shared}, jax.jit(plan.module.apply)
  want, got = (run(variables, **batch) for batch in batches())
  found = np.stack([got[0, 0], got[0, 1], got[1, 0]])
  np.testing.assert_allclose(found, want[:, 0], rtol=1e-4, atol=1e-5)
  assert np.abs(want[0] - want[1]).max() > 1e-2
  assert np.isfinite(got).all()  # in empty rows too


def test_looped_is_scanned_with_remat():
  """Logits and gradients; the layers of DistilBERT are stacked by BERT's."""
  plan, params, shared = build("modernbert", remat="full")
  looped, *_ = build("modernbert", scan=False)
  packed = batches()[1]

  @partial(jax.jit, static_argnums=0)
  @partial(jax.value_and_grad, argnums=1)
  def squares(module, trained, frozen):
    variables = {"params": join(trained, frozen), **shared}
    return jnp.sum(jnp.square(module.apply(variables, **packed)[0]))

  found = []
  for made, tree in ((plan, params), (looped, loop(params))):
    parts = split(tree, made.label(tree))
    found.append(squares(made.module, *parts))
  (value, grads), (other, others) = found
  np.testing.assert_allclose(value, other, rtol=1e-5)
  others = flatten_dict(others, sep="/")
  for path, leaf in flatten_dict(loop(grads), sep="/").items():
    scale = np.abs(leaf).max()
    assert scale > 0, path
    np.testing.assert_allclose(
      leaf / scale, others[path] / scale, atol=1e-3, err_msg=path
    )


def test_a_local_window_is_cut_by_example():
  """Only what lies in the window, and in the example, reaches a token."""
  fields = {**FIELDS["modernbert"], "num_hidden_layers": 1}
  fields |= {"layer_types": ["sliding_attention"]}
  plan = blueprint(fields, outputs=3)
  params = random_params(
    jax.eval_shape(partial(plan.module.init, jax.random.key(0)), **plan.inputs)[
      "params"
    ]
  )
  packed = batches()[1]
  packed["cls_positions"] = packed["cls_positions"].at[0, 0].set(4)
  logits = jax.jit(
    lambda ids: plan.module.apply(
      {"params": params}, **{**packed, "input_ids": ids}
    )
  )
  before = logits(packed["input_ids"])
  seen = {}  # column -> the slots of row 0 whose answer it changes
  for column in range(12):
    ids = packed["input_ids"].at[0, column].add(1)
    changed = np.abs(logits(ids) - before).max(-1)[0] > 1e-6
    seen[column] = set(np.flatnonzero(changed).tolist())
  assert [c for c in seen if 0 in seen[c]] == [2, 3, 4, 5, 6]  # 4 // 2 away
  assert [c for c in seen if 1 in seen[c]] == [9, 10, 11]


@pytest.mark.parametrize(
  "kind, changes, words",
  [
    ("distilbert", {"activation": "mish"}, "activation is 'mish'"),
    ("distilbert", {"n_heads": 0}, "num_attention_heads 0, .* too small"),
    ("distilbert", {"dim": 15}, "hidden_size 15 does not divide"),
    ("distilbert", {"n_layers": None}, "no usable num_hidden_layers"),
    ("modernbert", {"hidden_activation": "mish"}, "hidden_activation is"),
    ("modernbert", {"classifier_pooling": "max"}, "supports 'cls', 'mean'"),
    ("modernbert", {"layer_types": ["chunked"]}, "chunked.* no list of 3"),
    ("modernbert", {"head_dim": 4}, "heads of width 4"),
    ("modernbert", {"local_attention": "128"}, "no usable local_attention"),
    ("modernbert", {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    (
      "modernbert",
      {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
      "rope_type is 'yarn'",
    ),
    (
      "modernbert",
      {"layer_types": None, "global_attn_every_n_layers": 0},
      "global_attn_every_n_layers is 0",
    ),
  ],
)
def test_what_is_not_supported_is_named(kind, changes, words):
  with pytest.raises(UserError, match=words):
    config_of({**FIELDS[kind], **changes})


def test_rotations_of_old_and_new_files():
  """transformers 4.48 wrote two rates; 5 writes `rope_parameters`."""
  read = family_of({"model_type": "modernbert"}).config

  def thetas(**changes):
    config = read({**FIELDS["modernbert"], **changes})
    return config.global_theta, config.local_theta

  assert thetas() == (160_000.0, 10_000.0)
  assert thetas(global_rope_theta=5.0, local_rope_theta=3.0) == (5.0, 3.0)
  assert thetas(global_rope_theta=5.0, local_rope_theta=None) == (5.0, 5.0)
  new = {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}
  assert thetas(rope_parameters=new) == (7.0, 10_000.0)


@pytest.mark.parametrize("case", CASES)
def test_the_default_targets_of_ia3_fit_every_family(case):
  """Keys and values, and what enters each layer's last product."""
  settings = get_config().ia3.to_dict()
  plan = blueprint(CASES[case], outputs=3, method="ia3", settings=settings)
  layers = plan.config.num_hidden_layers
  found = [
    plan.module.adapter.init(jax.random.key(0), site).keys()
    for path, target in plan.targets.items()
    for site in [Site(path, target.inputs, target.outputs, lambda: None)]
    for _ in range(target.layers)
  ]
  assert found.count({"ia3_out"}) == 2 * layers
  assert found.count({"ia3_in"}) == layers
