"""A tiny random decoder with a tokenizer of whole words, and an adapter."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from vera_jax.adapters.files import load_adapter
from vera_jax.generate.generator import Generator
from vera_jax.models.hf_weights import to_hf
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import load_classifier, restore_adapter

WORDS = [f"w{i}" for i in range(20)]
SPECIAL = ["</s>", "<unk>", "<pad>"]
FIELDS = {
  "model_type": "gpt2",
  "vocab_size": len(SPECIAL) + len(WORDS),
  "initializer_range": 0.4,
  "n_embd": 16,
  "n_layer": 2,
  "n_head": 2,
  "n_positions": 48,
  "eos_token_id": 0,
}


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory) -> Path:
  from tokenizers import Tokenizer
  from tokenizers.models import WordLevel
  from tokenizers.pre_tokenizers import WhitespaceSplit
  from transformers import PreTrainedTokenizerFast

  folder = tmp_path_factory.mktemp("tiny_decoder")
  plan = blueprint(FIELDS, outputs=0, head="language_modelling", scan=False)
  shapes = unflatten_dict(plan.shapes)
  rng = np.random.default_rng(11)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), np.float32),
    shapes,
  )
  save_file(to_hf(params, plan.config), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(FIELDS))
  words = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
  tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
  tokenizer.pre_tokenizer = WhitespaceSplit()
  PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token="</s>",
    unk_token="<unk>",
    pad_token="<pad>",
  ).save_pretrained(folder)
  return folder


@pytest.fixture(scope="session")
def words_adapter(tiny_decoder, random_adapter) -> Path:
  """Its leaves are so large that it changes the words that are chosen."""
  return random_adapter(
    base=tiny_decoder,
    task="own_texts",
    kind="language_modelling",
    spread=1.0,
  )


@pytest.fixture(scope="session")
def generator(tiny_decoder) -> Generator:
  return Generator(load_classifier(tiny_decoder))


@pytest.fixture(scope="session")
def adapted_generator(words_adapter) -> Generator:
  return Generator(restore_adapter(load_adapter(words_adapter)))
