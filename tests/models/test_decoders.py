"""GPT-2 and Llama without torch: stacking, the cache, counts, refusals."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from tests.models.decoders import (
  CASES,
  GPT2,
  LLAMA,
  packed_and_padded,
  texts,
  unpacked,
)
from tests.models.test_bert import loop
from tests.models.test_families import VERA, random_params
from tests.slow import rest_is_slow
from vera_jax.adapters.labels import join, split
from vera_jax.errors import UserError
from vera_jax.models.decoder import empty_cache, logits
from vera_jax.models.family import config_of, family_of, read_fields
from vera_jax.models.hf_weights import load_params, module_path
from vera_jax.pretrained.blueprint import blueprint, load_model
from vera_jax.pretrained.sharding import BATCH, make_mesh, param_shardings

HEAD = "language_modelling"
TARGETS = {"gpt2": ["query", "value"], "llama": ["q_proj", "v_proj"]}
SMALL = {  # a window, fewer heads of keys, head norms
  "gpt2": GPT2,
  "llama": CASES["qwen3"],
}


@cache
def build(kind, **options):
  settings = {**VERA, "targets": TARGETS[kind]}
  plan = blueprint(
    SMALL[kind],
    outputs=0,
    head=HEAD,
    method="vera",
    settings=settings,
    **options,
  )
  init = partial(plan.module.init, jax.random.key(0))
  params = random_params(jax.eval_shape(init, **plan.inputs)["params"])
  return plan, params, {"projections": plan.projections(params)}


def test_looped_is_scanned_with_remat():
  """Logits and every trained leaf's gradient, packed and padded."""
  plan, params, shared = build("llama", remat="full")
  looped, *_ = build("llama", scan=False)
  packed, padded = packed_and_padded()

  @partial(jax.jit, static_argnums=0)
  @partial(jax.value_and_grad, argnums=1, has_aux=True)
  def squares(module, trained, frozen, batch):
    variables = {"params": join(trained, frozen), **shared}
    found = logits(module.apply(variables, **batch))
    real = batch["segment_ids"][..., None] > 0
    return jnp.sum(jnp.square(jnp.where(real, found, 0))), found

  found = []
  for made, tree, batch in (
    (plan, params, packed),
    (looped, loop(params), padded),
  ):
    trained, frozen = split(tree, made.label(tree))
    assert {path[-1] for path in flatten_dict(trained)} == {"vera_d", "vera_b"}
    found.append(squares(made.module, trained, frozen, batch))
  ((value, rows), grads), ((other, others), other_grads) = found
  np.testing.assert_allclose(value, other, rtol=1e-4)
  for one, two, text in zip(unpacked(rows), others, texts(), strict=True):
    np.testing.assert_allclose(one, two[: len(text)], atol=2e-4)
  assert np.isfinite(rows).all()  # at padding too
  other_grads = flatten_dict(other_grads, sep="/")
  for path, leaf in flatten_dict(loop(grads), sep="/").items():
    scale = np.abs(leaf).max()
    assert scale > 0, path
    np.testing.assert_allclose(
      leaf / scale, other_grads[path] / scale, atol=1e-3, err_msg=path
    )


@pytest.mark.parametrize("kind", rest_is_slow(["llama", "gpt2"]))
def test_long_rows_by_blocks(kind):
  """Four texts in a row of 96 by blocks of 32, and compared whole."""
  plan, params, shared = build(kind, longest=20, scan=kind == "llama")
  module = plan.module
  assert module.model.longest == 20
  rng = np.random.default_rng(2)
  lengths = (20, 17, 20, 19, 18)
  ids = rng.integers(3, 50, (1, 96)).astype(np.int32)
  batch = {
    "input_ids": ids,
    "positions": np.concatenate([*map(np.arange, lengths), [0, 0]])[None],
    "segment_ids": np.repeat(np.arange(6), (*lengths, 2))[None] + 1,
    "read_positions": np.arange(1, 90, 3)[None],
  }
  batch["segment_ids"] = batch["segment_ids"] % 6
  batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
  if not plan.scan:
    params = loop(params) if "layer" in params["encoder"] else params
  trained, frozen = split(params, plan.label(params))

  @partial(jax.jit, static_argnums=0)
  @partial(jax.value_and_grad, argnums=1, has_aux=True)
  def squares(module, trained, frozen):
    found = logits(
      module.apply({"params": join(trained, frozen), **shared}, **batch)
    )
    return jnp.sum(jnp.square(found)), found

  whole = module.clone(model=module.model.clone(longest=None))
  (found, grads), (want, want_grads) = (
    (values[1], grads)
    for values, grads in (squares(m, trained, frozen) for m in (module, whole))
  )
  np.testing.assert_allclose(found, want, atol=1e-4)
  want_grads = flatten_dict(want_grads)
  for path, leaf in flatten_dict(grads).items():
    scale = np.abs(want_grads[path]).max()
    assert scale > 0, path
    np.testing.assert_allclose(
      leaf / scale, want_grads[path] / scale, atol=1e-4, err_msg="/".join(path)
    )


@pytest.mark.parametrize("kind", rest_is_slow(["llama", "gpt2"]))
def test_the_cache_row_by_row(kind):
  """Prompts of 4 and 2 tokens, then three steps, equal the whole texts."""
  plan, params, shared = build(kind, scan=kind == "gpt2")
  variables = {"params": params, **shared}
  rows = jnp.asarray([text[:7] for text in (texts()[0], texts()[2])])
  reads = jnp.asarray([[3, 6], [1, 4]])
  run = jax.jit(lambda v, *x, **y: plan.module.apply(v, *x, **y))

  @jax.jit
  def at_once(variables, rows, reads):
    run = partial(plan.module.apply, variables, rows)
    return logits(run()), logits(run(read_positions=reads))

  whole, read = at_once(variables, rows, reads)
  picked = jnp.take_along_axis(whole, reads[..., None], axis=1)
  np.testing.assert_allclose(read, picked, atol=1e-5)

  cache = empty_cache(plan.config, 2, 7)
  # padding in front and behind, of words that must leave no trace
  prompt = jnp.asarray([rows[0, :4].tolist(), [9, *rows[1, :2].tolist(), 9]])
  real = jnp.asarray([[1, 1, 1, 1], [0, 1, 1, 0]])
  words, cache = run(variables, prompt, segment_ids=real, cache=cache)
  first = logits(words)
  np.testing.assert_allclose(first[0, 3], whole[0, 3], atol=1e-4)
  np.testing.assert_allclose(first[1, 2], whole[1, 1], atol=1e-4)
  assert np.isfinite(first).all()
  for step in range(3):
    token = jnp.asarray([[rows[0, 4 + step]], [rows[1, 2 + step]]])
    words, cache = run(variables, token, cache=cache)
    found = logits(words)[:, 0]
    np.testing.assert_allclose(found[0], whole[0, 4 + step], atol=1e-4)
    np.testing.assert_allclose(found[1], whole[1, 2 + step], atol=1e-4)
  assert cache.positions.tolist() == [7, 5]
  # a full row: what does not fit is dropped, and the other goes on
  token = jnp.asarray([[5], [rows[1, 5]]])
  words, after = run(variables, token, cache=cache)
  np.testing.assert_allclose(logits(words)[1, 0], whole[1, 5], atol=1e-4)
  for new, old in zip(after.keys, cache.keys, strict=True):
    np.testing.assert_array_equal(new[0], old[0])


def test_split_over_devices():
  """Over fsdp and tensor the logits are those of one device."""
  plan, params, shared = build("llama")
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  places = param_shardings(params, mesh, plan.family.rules)
  found = {tuple(leaf.spec) for leaf in jax.tree.leaves(places)}
  assert found >= {(None, "tensor", "fsdp"), (None, "fsdp", "tensor")}
  packed, _ = packed_and_padded()
  # rows are split over data and fsdp
  batch = {name: jnp.tile(x, (2, 1)) for name, x in packed.items()}
  rows = {name: NamedSharding(mesh, BATCH) for name in batch}

  def run(params, batch):
    return logits(plan.module.apply({"params": params, **shared}, **batch))

  got = jax.jit(run, in_shardings=(places, rows))(params, batch)
  want = jax.jit(run)(params, batch)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_tensor_must_not_cut_through_a_head_of_keys(tmp_path):
  """Here eight heads of queries would divide, and two of keys don't."""
  fields = {**LLAMA, "num_attention_heads": 8}
  plan = blueprint(fields, outputs=0, head=HEAD)
  mesh = make_mesh(data=1, fsdp=2, tensor=4)
  with pytest.raises(UserError, match="2 attention heads do not divide"):
    load_model(plan, tmp_path, mesh=mesh, seed=0)


@pytest.fixture(scope="module")
def stories() -> Path:
  """stories260K, a Llama of 260,000 numbers, where it lies beside us."""
  folder = Path(__file__).resolve().parents[3] / "shared/data/checkpoints"
  if not (folder / "stories260K").is_dir():
    pytest.skip("the small Llama is not beside the checkout")
  return folder / "stories260K"


def test_stories_come_out_word_for_word(stories):
  """199 greedy tokens and logits that the checkpoint's own program gave."""
  plan = blueprint(read_fields(stories), outputs=0, head=HEAD)
  loaded = load_params(stories, unflatten_dict(plan.shapes))
  assert loaded[1:] == ((), (), ())
  want = json.loads((stories / "expected_greedy.json").read_text())

  @jax.jit
  def tell(params):
    def step(carry, _):
      token, cache = carry
      words, cache = plan.module.apply({"params": params}, token, cache=cache)
      found = logits(words)[0]
      token = found.argmax(-1, keepdims=True).astype(jnp.int32)
      return (token, cache), (token[0, 0], found[0])

    start = jnp.asarray([[1]], jnp.int32), empty_cache(plan.config, 1, 200)
    return jax.lax.scan(step, start, length=200)[1]

  tokens, found = tell(loaded.params)
  assert [1, *tokens[:-1].tolist()] == want["ids"]
  np.testing.assert_allclose(found[0], want["logits_first_position"], atol=1e-4)
  np.testing.assert_allclose(
    found[199], want["logits_last_position"], atol=1e-4
  )


SIZES = [("small", 12, 768, 12), ("medium", 24, 1024, 16)]
LARGE = ("large", 36, 1280, 20)


@pytest.mark.parametrize(
  "size, targets, count",
  [
    (SIZES[0], ["query", "value"], 43_008),
    (SIZES[1], ["query", "value"], 98_304),
    (LARGE, ["query", "value"], 165_888),
    (SIZES[1], ["c_attn"], 98_304),
    (LARGE, ["c_attn"], 175_104),
  ],
)
def test_the_papers_counts(size, targets, count):
  """Table 2 counts query and value apart; large tells it from PEFT's way."""
  _, layers, width, heads = size
  sizes = {"n_layer": layers, "n_embd": width, "n_head": heads}
  plan = blueprint(
    {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, **sizes},
    outputs=0,
    head=HEAD,
    method="vera",
    settings={**VERA, "rank": 1024, "targets": targets},
  )
  leaves = jax.tree.leaves(plan.own_shapes()[0])
  assert sum(leaf.size for leaf in leaves) == count


def test_masks_in_old_files_are_dropped():
  names = family_of({"model_type": "gpt2"}).names
  for name in ("h.0.attn.bias", "transformer.h.11.attn.masked_bias"):
    assert ".".join(module_path(name, names)).startswith(names.unused)
  kept = "h.0.attn.c_attn.bias"
  assert not ".".join(module_path(kept, names)).startswith(names.unused)
  names = family_of({"model_type": "llama"}).names
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  assert ".".join(module_path(name, names)).startswith(names.unused)


ROPE = "rope_parameters"
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 2,
  "low_freq_factor": 4,
  "high_freq_factor": 1,
}


@pytest.mark.parametrize(
  "case, changes, words",
  [
    ("gpt2", {"activation_function": "mish"}, "activation_function is"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"n_head": 3}, "16 does not divide"),
    ("gpt2", {"n_layer": None}, "no usable num_hidden_layers"),
    ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ("llama", {"num_key_value_heads": 3}, "not divide into num_key_value"),
    ("llama", {"head_dim": 3}, "heads of width 3"),
    ("llama", {ROPE: {"rope_type": "longrope"}}, "longrope without 2"),
    ("llama", {"rope_scaling": {"type": "su"}}, "rope_type is 'su'"),
    ("llama", {ROPE: {"rope_type": "linear"}}, "factor is None"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {ROPE: {"full_attention": {}}}, "differ by layer"),
    ("qwen3", {"layer_types": ["chunked"]}, "chunked.* no list of 2"),
    ("qwen2", {"intermediate_size": None}, "no usable intermediate_size"),
    ("gpt2", {"n_embd": "a"}, "unusable value.*'a'"),
    ("llama", {"num_key_value_heads": 0}, "key_value_heads 0, .* too small"),
    ("llama", {"rope_scaling": "linear"}, "unusable value.*'str'"),
    ("llama", {ROPE: {"rope_theta": "a"}}, "rope_theta is 'a'"),
    ("llama", {ROPE: LLAMA3}, "high_freq_factor 1, .* low_freq_factor 4"),
    ("llama", {"model_type": ["llama"]}, r"model_type is \['llama'\]"),
  ],
)
def test_what_is_not_supported_is_named(case, changes, words):
  fields = {**CASES[case], **changes}
  with pytest.raises(UserError, match=words):
    config_of(fields)
