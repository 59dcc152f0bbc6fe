"""Decoders against transformers' torch models; skips without torch."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from tests.models.decoders import (
  CASES,
  packed_and_padded,
  random_peer,
  texts,
  unpacked,
)
from vera_jax.models.decoder import empty_cache, logits
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params, to_hf
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import load_classifier

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

HEAD = "language_modelling"


def torch_logits(peer, text):
  with torch.no_grad():
    return peer(torch.tensor([text])).logits[0].numpy()


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_packed_padded_and_step_by_step(case, scan, tmp_path):
  peer = random_peer(CASES[case], tmp_path)
  plan = blueprint(read_fields(tmp_path), outputs=0, head=HEAD, scan=scan)
  loaded = load_params(tmp_path, unflatten_dict(plan.shapes))
  assert loaded[1:] == ((), (), ())
  variables = {"params": loaded.params}
  want = [torch_logits(peer, text) for text in texts()]
  assert min(np.ptp(x, axis=0).min() for x in want) > 0.01

  @jax.jit
  def whole(variables, batch):
    return logits(plan.module.apply(variables, **batch))

  packed, padded = packed_and_padded()
  for found, expected in zip(
    unpacked(whole(variables, packed)), want, strict=True
  ):
    np.testing.assert_allclose(found, expected, atol=1e-4)

  # Two tokens of each text, or one, as a prompt; then one by one.
  @jax.jit
  def step(variables, ids, segments, cache):
    words, cache = plan.module.apply(
      variables, ids, segment_ids=segments, cache=cache
    )
    return logits(words), cache

  ids, real = padded["input_ids"], padded["segment_ids"]
  cache = empty_cache(plan.config, 3, 12)
  prompt = real[:, :2].at[1, 1].set(0)
  done = [2, 1, 2]
  found, cache = step(variables, ids[:, :2], prompt, cache)
  steps = [list(row[:n]) for row, n in zip(found, done, strict=True)]
  for _ in range(8):
    columns = jnp.asarray(done)[:, None]
    found, cache = step(
      variables,
      jnp.take_along_axis(ids, columns, axis=1, mode="clip"),
      (columns < real.sum(1, keepdims=True)).astype(jnp.int32),
      cache,
    )
    for row in range(3):
      steps[row].append(found[row, 0])
      done[row] += 1
  assert cache.positions.tolist() == [9, 3, 7]
  for found, expected in zip(steps, want, strict=True):
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4)

  tensors, state = to_hf(loaded.params, plan.config), peer.state_dict()
  if plan.config.tie_word_embeddings:
    del state["lm_head.weight"]
  assert tensors.keys() == state.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(value, state[name].numpy(), err_msg=name)


@pytest.mark.parametrize(
  "rope",
  [
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    {
      "rope_type": "yarn",
      "factor": 8.0,
      "mscale": 0.7,
      "mscale_all_dim": 0.4,
      "truncate": False,
      "original_max_position_embeddings": 6,
    },
    {"type": "linear", "factor": 3.0},
  ],
)
def test_rotations(rope, tmp_path):
  """The further ways of transformers' `rope_scaling`."""
  fields = {**CASES["llama"], "rope_scaling": dict(rope), "rope_theta": 30.0}
  peer = random_peer(fields, tmp_path)
  text = np.random.default_rng(0).integers(3, 50, 20).tolist()
  for given in (fields, read_fields(tmp_path)):  # as in old and new files
    plan = blueprint(given, outputs=0, head=HEAD)
    params = load_params(tmp_path, unflatten_dict(plan.shapes)).params
    run = jax.jit(partial(plan.module.apply, {"params": params}))
    found = logits(run(jnp.asarray([text])))[0]
    np.testing.assert_allclose(found, torch_logits(peer, text), atol=1e-4)


def test_shards_and_bfloat16(tmp_path):
  """The same weights in four files, and computing in sixteen bits."""
  peer = random_peer(CASES["llama"], tmp_path, max_shard_size="6kB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  plan = blueprint(
    read_fields(tmp_path), outputs=0, head=HEAD, dtype=jnp.bfloat16
  )
  loaded = load_params(tmp_path, unflatten_dict(plan.shapes))
  assert loaded[1:] == ((), (), ())
  text = texts()[0]
  run = jax.jit(partial(plan.module.apply, {"params": loaded.params}))
  words = run(jnp.asarray([text]))
  assert words.hidden.dtype == words.kernel.dtype == jnp.bfloat16
  want = torch_logits(peer, text)
  difference = np.abs(logits(words)[0] - want).max() / np.abs(want).max()
  assert 1e-5 < difference < 0.05


def test_the_text_part_of_a_network_that_reads_images_too(tmp_path):
  """As its files have had their names so far, and as new ones have them."""
  text = {k: v for k, v in CASES["gemma3_text"].items() if k != "model_type"}
  vision = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
  vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
  torch.manual_seed(0)
  config = transformers.Gemma3Config(text_config=text, vision_config=vision)
  peer = transformers.Gemma3ForConditionalGeneration(config).eval()
  with torch.no_grad():
    for value in peer.parameters():
      value.normal_(std=0.3)
  peer.save_pretrained(tmp_path)
  file, ids = tmp_path / "model.safetensors", texts()[0]
  want = torch_logits(peer, ids)
  stored = safetensors.numpy.load_file(file)
  old, new = "language_model.model.", "model.language_model."
  assert any(name.startswith(old) for name in stored)
  for prefix in (old, new):
    renamed = {name.replace(old, prefix): x for name, x in stored.items()}
    safetensors.numpy.save_file(renamed, file)
    model = load_classifier(tmp_path, scan=False)
    assert model.config.model_type == "gemma3_text"
    run = jax.jit(model.module.apply)
    found = logits(run(model.variables, jnp.asarray([ids])))[0]
    np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.parametrize("case", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_an_untied_head_under_a_config_that_ties(case, tmp_path):
  fields = {**CASES[case], "tie_word_embeddings": False}
  random_peer(fields, tmp_path)
  file = tmp_path / "config.json"
  written = {**json.loads(file.read_text()), "tie_word_embeddings": True}
  file.write_text(json.dumps(written))
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  model = load_classifier(tmp_path, scan=False)
  text = texts()[0]
  found = logits(
    jax.jit(model.module.apply)(model.variables, jnp.asarray([text]))
  )
  np.testing.assert_allclose(found[0], torch_logits(peer, text), atol=1e-4)
