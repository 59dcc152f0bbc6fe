"""What holds for every family: names, rules of sharding, counts, dropout."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.decoders import CASES
from tests.models.test_families import VERA, random_params
from tests.models.test_fields import BASES, LIKE
from tests.models.test_vision import NEWER
from tests.slow import rest_is_slow
from vera_jax.errors import UserError
from vera_jax.models.family import family_of
from vera_jax.models.hf_weights import module_name, module_path
from vera_jax.pretrained.blueprint import blueprint

NAMES = {
  "bert": ("embeddings/LayerNorm", "bert.embeddings.LayerNorm"),
  "distilbert": (
    "encoder/layer_2/attention/query",
    "distilbert.transformer.layer.2.attention.q_lin",
  ),
  "modernbert": ("encoder/layer_0/next_norm", "model.layers.1.attn_norm"),
  "gpt2": ("encoder/layer_11/attn/c_attn", "transformer.h.11.attn.c_attn"),
  "llama": (
    "encoder/layer_3/self_attn/q_proj",
    "model.layers.3.self_attn.q_proj",
  ),
  "gemma3_text": ("encoder/layer_0/mlp/up_proj", "model.layers.0.mlp.up_proj"),
}
LLAMA = CASES["llama_biases"]
each_kind = pytest.mark.parametrize("kind", BASES)


def head_of(kind):
  return next(iter(family_of(BASES[kind]).classes))


def build(kind, **options):
  return blueprint(BASES[kind], outputs=3, head=head_of(kind), **options)


@each_kind
def test_names_there_and_back_and_rules_of_leaves_that_are_there(kind):
  """A base alone has its names without the prefix."""
  plan = build(kind, scan=False)
  names = plan.family.names
  prefix = names.prefixes[0]
  for path in {path[:-1] for path in plan.shapes}:
    name = module_name(path, names=names)
    assert module_path(name, names) == path
    assert module_path(name.removeprefix(prefix), names) == path
  if kind in NAMES:
    path, name = NAMES[kind]
    assert module_name(tuple(path.split("/")), names=names) == name
  for path, newer in NEWER.get(kind, {}).items():
    in_file = module_name(tuple(path.split("/")), names=names)
    assert names.to_class(in_file) == f"{kind}.{newer}"
  if kind in LIKE:  # whose rules are another kind's
    return
  own = {"tie_word_embeddings": False}  # so that there is a head's table
  fields = {
    "llama": {**LLAMA, **own},
    "gemma3_text": {**BASES["gemma3_text"], **own, "attention_bias": True},
  }.get(kind, BASES[kind])
  shapes = blueprint(fields, outputs=3, head=head_of(kind)).shapes
  paths = ["/".join(path) for path in shapes]
  for pattern, axes in plan.family.rules:
    assert axes and any(re.fullmatch(pattern, path) for path in paths), pattern


@each_kind
def test_unknown_heads_and_remat_are_refused(kind):
  with pytest.raises(UserError, match=f"{kind} has no head for poems"):
    blueprint(BASES[kind], outputs=3, head="poems")
  with pytest.raises(UserError, match="'half'.*none, full, dots"):
    build(kind, remat="half")


@pytest.mark.parametrize("kind", ["distilbert", "modernbert", "gpt2", "vit"])
def test_vera_has_the_papers_counts_on_query_and_value(kind):
  """r + out for each site, of a fused kernel's part as of a whole layer."""
  plan = build(kind, method="vera", settings=VERA)
  leaves = flatten_dict(plan.own_shapes()[0])
  layers = plan.config.num_hidden_layers
  assert sum(x.size for x in leaves.values()) == layers * 2 * (4 + 16)
  assert {path[-2] for path in leaves} == {"query", "value"}
  assert plan.plans.keys() == {path[:-1] for path in leaves}


DRAWS = [  # how often masks are drawn: ModernBERT has three layers, others two
  ("distilbert", "dropout", 1 + 2),
  ("distilbert", "attention_dropout", 2),
  ("distilbert", "seq_classif_dropout", 1),
  ("modernbert", "embedding_dropout", 1),
  ("modernbert", "attention_dropout", 2 * 3),
  ("modernbert", "mlp_dropout", 3),
  ("modernbert", "classifier_dropout", 1),
  ("gpt2", "embd_pdrop", 1),
  ("gpt2", "attn_pdrop", 2),
  ("gpt2", "resid_pdrop", 4),
  ("llama", "attention_dropout", 2),
]


@pytest.mark.parametrize("kind, rate, draws", DRAWS)
def test_each_dropout_rate_is_used(kind, rate, draws):
  """BERT's are in test_bert.py."""
  off = {name: 0.0 for other, name, _ in DRAWS if other == kind}
  plan = blueprint(
    {**BASES[kind], **off, rate: 0.5},
    outputs=3,
    head=head_of(kind),
    scan=False,
  )
  ids = jnp.ones((1, 8), jnp.int32)
  params = jax.eval_shape(plan.module.init, jax.random.key(0), ids)

  def count(deterministic):
    options = {"rngs": {"dropout": jax.random.key(0)}}
    run = partial(plan.module.apply, deterministic=deterministic, **options)
    return str(jax.make_jaxpr(run)(params, ids)).count("= random_bits[")

  assert (count(deterministic=False), count(deterministic=True)) == (draws, 0)


@pytest.mark.parametrize(
  "kind, bound",
  rest_is_slow([("bert", 0.1), ("modernbert", 0.2), ("dinov2", 0.3)]),
)
def test_bfloat16_computes_low_and_answers_in_float32(kind, bound):
  plan, low = build(kind), build(kind, dtype=jnp.bfloat16)
  rng = np.random.default_rng(0)
  init = partial(plan.module.init, jax.random.key(0))
  params = random_params(jax.eval_shape(init, **plan.inputs)["params"])
  if "pixel_values" in plan.inputs:
    batch = {"pixel_values": rng.standard_normal((2, 12, 12, 3), np.float32)}
  else:
    batch = {"input_ids": rng.integers(5, 50, (2, 9), np.int32)}

  want, got = (
    jax.jit(made.module.apply)({"params": params}, **batch)
    for made in (plan, low)
  )
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=bound)
  assert np.abs(got - want).max() > 1e-5
  stored = {path[0]: leaf.dtype for path, leaf in low.shapes.items()}
  assert stored["encoder"] == jnp.bfloat16
  assert stored.get("classifier", "float32") == "float32"
