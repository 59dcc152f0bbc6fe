"""The same texts as transformers.generate, on tiny random checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.generate.markov import padded
from vera_jax.generate.beam import Beam
from vera_jax.generate.decode import compiled
from vera_jax.generate.sampling import Sampling
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params
from vera_jax.pretrained.blueprint import blueprint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

NEW, EOS = 12, (2, 3)
SIZES = {"vocab_size": 41, "initializer_range": 0.6}
CONFIGS = {
  "gpt2": lambda: transformers.GPT2Config(
    n_embd=24, n_layer=2, n_head=3, n_positions=40, **SIZES
  ),
  "llama": lambda: transformers.LlamaConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=32,
    max_position_embeddings=40,
    **SIZES,
  ),
}
HOWS = [
  Sampling(),
  Sampling(no_repeat_ngram=2),
  Beam(beams=4),
  Beam(beams=3, length_penalty=0.6, no_repeat_ngram=3, early_stopping=True),
  Beam(beams=5, length_penalty=-1.0, early_stopping="never"),
  Beam(beams=2, length_penalty=2.0, no_repeat_ngram=1),
]


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
  """A checkpoint in torch, and its parts here."""
  torch.manual_seed(5)
  theirs = transformers.AutoModelForCausalLM.from_config(
    CONFIGS[request.param]()
  ).eval()
  folder = tmp_path_factory.mktemp(request.param)
  theirs.save_pretrained(folder)
  plan = blueprint(
    read_fields(folder), outputs=0, head="language_modelling", scan=True
  )
  params = load_params(folder, unflatten_dict(plan.shapes)).params
  return theirs, plan, {"params": jax.tree.map(jnp.asarray, params)}


def settings_of(how) -> dict:
  if isinstance(how, Sampling):
    return {"no_repeat_ngram_size": how.no_repeat_ngram}
  return {
    "num_beams": how.beams,
    "length_penalty": how.length_penalty,
    "no_repeat_ngram_size": how.no_repeat_ngram,
    "early_stopping": how.early_stopping,
  }


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_the_same_texts(pair, how):
  theirs, plan, variables = pair
  rng = np.random.default_rng(0)
  prompts = [rng.integers(4, 41, n).tolist() for n in (5, 1, 9, 5, 2, 7, 3, 4)]
  found = compiled(
    plan.module.model,
    plan.config,
    variables,
    *map(jnp.asarray, padded(prompts)),
    jax.random.split(jax.random.key(0), len(prompts)),
    how=how,
    eos=EOS,
    max_new_tokens=NEW,
  )
  ids, lengths = np.asarray(found.ids), np.asarray(found.lengths)
  if isinstance(how, Beam):
    ids, lengths = ids[:, 0], lengths[:, 0]
  ends = 0
  for prompt, row, length in zip(prompts, ids, lengths, strict=True):
    out = theirs.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      max_new_tokens=NEW,
      eos_token_id=list(EOS),
      pad_token_id=0,
      do_sample=False,
      **settings_of(how),
    )
    answer = out[0, len(prompt) :].tolist()
    assert row[:length].tolist() == answer
    ends += answer[-1] in EOS
  if isinstance(how, Beam) and how.length_penalty < 0:
    assert ends  # short texts win
