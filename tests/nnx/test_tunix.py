"""tunix trains an adapter of ours as it trains its own LoRA."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import vera_jax
import vera_jax.nnx

pytest.importorskip("tunix", reason="requirements-tunix.txt is not installed")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore"),  # of tunix's dependencies
]
LENGTH, STEPS = 8, 6
rng = np.random.default_rng(0)
ROWS = [rng.integers(0, 8, (4, LENGTH)) for _ in range(STEPS)]


@pytest.fixture(autouse=True)
def tunix_adds_arrays_of_different_ranks():
  with jax.numpy_rank_promotion("allow"):
    yield


def llama():
  from tunix.models.llama3 import model

  config = model.ModelConfig(
    num_layers=2,
    vocab_size=16,
    embed_dim=16,
    hidden_dim=24,
    num_heads=4,
    head_dim=4,
    num_kv_heads=2,
    norm_eps=1e-5,
    rope_theta=10_000,
  )
  network = model.Llama3(config, rngs=nnx.Rngs(0))
  keys = nnx.Rngs(1)
  for layer in network.layers:  # tunix leaves these at zero, without gradients
    for kernel in (
      x.kernel for x in vars(layer.mlp).values() if isinstance(x, nnx.Linear)
    ):
      kernel.set_value(0.2 * jax.random.normal(keys.params(), kernel.shape))
  return network


def adapted():
  return vera_jax.nnx.adapt(
    llama(), vera_jax.vera(rank=32), targets=["q_proj", "v_proj", "up_proj"]
  )


def inputs(tokens):
  rows = len(tokens)
  causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
  return {
    "positions": jnp.tile(jnp.arange(LENGTH), (rows, 1)),
    "attention_mask": jnp.tile(causal, (rows, 1, 1)),
  }


def train(model, folder, *, steps):
  from tunix.sft import peft_trainer

  every = ocp.CheckpointManagerOptions(save_interval_steps=STEPS // 2)
  config = peft_trainer.TrainingConfig(
    eval_every_n_steps=100,
    max_steps=steps,
    checkpoint_root_directory=str(folder),
    checkpointing_options=every,
  )
  trainer = peft_trainer.PeftTrainer(model, optax.adamw(0.03), config)
  trainer.with_gen_model_input_fn(
    lambda row: {
      "input_tokens": row.input_tokens,
      "input_mask": row.input_mask,
      **inputs(row.input_tokens),
    }
  )
  trainer.train(
    [peft_trainer.TrainingInput(row, np.ones_like(row, bool)) for row in ROWS]
  )
  return model


def values(model, kind):
  state = nnx.to_pure_dict(nnx.state(model, kind))
  return jax.tree.map(np.asarray, state)


def base(path, variable):
  del path
  return not isinstance(variable, nnx.LoRAParam)


def test_only_d_and_b_are_trained_saved_and_resumed(tmp_path):
  before = adapted()
  trained = train(adapted(), tmp_path / "whole", steps=STEPS)
  jax.tree.map(
    np.testing.assert_array_equal, values(trained, base), values(before, base)
  )
  leaves = values(trained, nnx.LoRAParam)
  assert len(jax.tree.leaves(leaves)) == 2 * 2 * 3
  moves = jax.tree.map(
    lambda now, then: (now != then).any(),
    leaves,
    values(before, nnx.LoRAParam),
  )
  assert all(jax.tree.leaves(moves)), moves

  train(adapted(), tmp_path / "parts", steps=STEPS // 2)
  resumed = train(adapted(), tmp_path / "parts", steps=STEPS)
  jax.tree.map(
    np.testing.assert_array_equal, values(resumed, nnx.LoRAParam), leaves
  )

  tokens = jnp.asarray(ROWS[0])
  merged = vera_jax.nnx.merge(trained)
  assert type(merged) is type(llama())
  logits, expected = (
    model(tokens, cache=None, **inputs(tokens))[0]
    for model in (merged, trained)
  )
  np.testing.assert_allclose(logits, expected, rtol=2e-6, atol=2e-6)
