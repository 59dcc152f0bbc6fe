"""tunix trains an adapter of ours as it trains its own LoRA."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

import vera_jax
import vera_jax.nnx
from vera_jax.errors import UserError

pytest.importorskip("tunix", reason="requirements-tunix.txt is not installed")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore"),  # of tunix's dependencies
]
STEPS, HALF = 4, 2
TARGETS = {  # all linear layers
  "llama3": [".*_proj", "lm_head"],
  "qwen3": [".*_proj", "lm_head"],
  "gemma3": [".*_proj", ".*_einsum"],
}
every_network = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture(autouse=True)
def tunix_adds_arrays_of_different_ranks():
  before = jax.config.values["jax_numpy_rank_promotion"]
  jax.config.update("jax_numpy_rank_promotion", "allow")  # in all threads
  yield
  jax.config.update("jax_numpy_rank_promotion", before)


def network(name):
  """A tiny one with random weights."""
  from tunix.models.gemma3.model import Gemma3
  from tunix.models.gemma3.model import ModelConfig as Gemma3Config
  from tunix.models.llama3.model import Llama3
  from tunix.models.llama3.model import ModelConfig as Llama3Config
  from tunix.models.qwen3.model import ModelConfig as Qwen3Config
  from tunix.models.qwen3.model import Qwen3

  from examples.tunix.counting import ALPHABET

  shape = {
    "num_layers": 2,
    "embed_dim": 16,
    "hidden_dim": 24,
    "num_heads": 4,
    "head_dim": 4,
    "num_kv_heads": 2,
  }
  of_texts = {"norm_eps": 1e-5, "rope_theta": 1_000_000}
  size = len(ALPHABET)
  if name == "llama3":
    config = Llama3Config(**shape, **of_texts, vocab_size=size)
    model = Llama3(config, rngs=nnx.Rngs(0))
  elif name == "qwen3":
    config = Qwen3Config(**shape, **of_texts, vocab_size=size)
    model = Qwen3(config, rngs=nnx.Rngs(0))
  else:
    config = Gemma3Config(
      **shape, num_embed=size, sliding_window_size=4, param_dtype=jnp.float32
    )
    model = Gemma3(config, rngs=nnx.Rngs(0))
  keys = nnx.Rngs(1)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, nnx.Linear):  # tunix's own are zero
      kernel = 0.2 * jax.random.normal(keys.params(), module.kernel.shape)
      module.kernel.set_value(kernel)
  return model


def adapted(name):
  from examples.tunix.counting import one_device, put_on

  model = vera_jax.nnx.adapt(
    network(name), vera_jax.vera(rank=32), targets=TARGETS[name]
  )
  put_on(one_device(), model)
  return model


def values(model, kind):
  state = nnx.to_pure_dict(nnx.state(model, kind))
  return jax.tree.map(np.asarray, state)


def base(path, variable):
  del path
  return not isinstance(variable, nnx.LoRAParam)


def equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def check_trained(name, model):
  """The base has its bits, and every d and b moved."""
  before = adapted(name)
  equal(values(model, base), values(before, base))
  moves = jax.tree.map(
    lambda now, then: (now != then).any(),
    values(model, nnx.LoRAParam),
    values(before, nnx.LoRAParam),
  )
  layers = {"llama3": 15, "qwen3": 15, "gemma3": 12}[name]
  assert len(jax.tree.leaves(moves)) == 2 * layers
  assert all(jax.tree.leaves(moves)), moves


def checkpoints(folder):
  """Where and when tunix's manager saves."""
  return {
    "checkpoint_root_directory": str(folder),
    "checkpointing_options": ocp.CheckpointManagerOptions(
      save_interval_steps=HALF
    ),
    "eval_every_n_steps": 100,
  }


def check_saved(folder, model):
  """A step's folder holds d and b, and what the optimiser has of them."""
  item = ocp.PyTreeCheckpointHandler()
  saved = item.restore(folder / str(STEPS) / "model_params")
  leaves = values(model, nnx.LoRAParam)
  saved = {path[:-1]: leaf for path, leaf in flatten_dict(saved).items()}
  equal(
    saved,
    {tuple(map(str, path)): x for path, x in flatten_dict(leaves).items()},
  )
  numbers = sum(x.size for x in jax.tree.leaves(leaves))
  of_optimiser = item.restore(folder / str(STEPS) / "optimizer_state")
  arrays = [x for x in jax.tree.leaves(of_optimiser) if np.ndim(x)]
  assert sum(x.size for x in arrays) == 2 * numbers  # Adam's two moments


def only_half(whole, folder):
  """What a run has left that was stopped after half of the steps."""
  shutil.copytree(whole / str(HALF), folder / str(HALF))
  return folder


@every_network
def test_only_d_and_b_are_trained_saved_and_resumed(name, tmp_path):
  from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

  from examples.tunix.counting import model_inputs

  rows = np.random.default_rng(0).integers(3, 13, (STEPS, 4, 6))
  mask = np.ones((4, 6), bool)

  def train(folder):
    model = adapted(name)
    config = TrainingConfig(max_steps=STEPS, **checkpoints(folder))
    trainer = PeftTrainer(model, optax.adam(0.03), config)
    trainer.with_gen_model_input_fn(
      lambda x: vars(x) | model_inputs(x.input_tokens)
    )
    trainer.train([TrainingInput(row, mask) for row in rows])
    return model

  whole = train(tmp_path / "whole")
  check_trained(name, whole)
  check_saved(tmp_path / "whole", whole)
  resumed = train(only_half(tmp_path / "whole", tmp_path / "half"))
  equal(values(resumed, nnx.LoRAParam), values(whole, nnx.LoRAParam))

  tokens = jnp.asarray(rows[0])
  merged = vera_jax.nnx.merge(whole)
  assert type(merged) is type(network(name))
  given = model_inputs(tokens)
  logits, expected = (
    model(tokens, given["positions"], None, given["attention_mask"])[0]
    for model in (merged, whole)
  )
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * scale)


@every_network
def test_preferences_train_d_and_b(name, tmp_path):
  from tunix.sft.dpo.dpo_trainer import (
    DPOTrainer,
    DPOTrainingConfig,
    TrainingInput,
  )

  rng = np.random.default_rng(0)
  mask = np.ones((4, 3), bool)
  rows = [
    TrainingInput(*x)
    for x in (
      [part for y in rng.integers(3, 13, (3, 4, 3)) for part in (y, mask)]
      for _ in range(STEPS)
    )
  ]

  def train(folder):
    model = adapted(name)
    config = DPOTrainingConfig(
      max_steps=STEPS,
      max_prompt_length=3,
      max_response_length=3,
      **checkpoints(folder),
    )
    reference = vera_jax.nnx.reference(model)
    first = values(reference, nnx.Param)
    DPOTrainer(model, reference, optax.adam(0.03), config).train(rows)
    equal(values(reference, nnx.Param), first)
    return model

  whole = train(tmp_path / "whole")
  check_trained(name, whole)
  check_saved(tmp_path / "whole", whole)
  resumed = train(only_half(tmp_path / "whole", tmp_path / "half"))
  equal(values(resumed, nnx.LoRAParam), values(whole, nnx.LoRAParam))


@every_network
def test_rollouts_answer_as_the_trained_model_at_every_step(name, tmp_path):
  from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
  from tunix.rl.rl_cluster import (
    ClusterConfig,
    RLCluster,
    RLTrainingConfig,
    Role,
  )
  from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
  from tunix.rl.rollout.vanilla_rollout import VanillaRollout

  from examples.tunix.counting import (
    DIGITS,
    Characters,
    model_inputs,
    one_device,
    share_counted,
  )
  from vera_jax.nnx.tunix import MergedRollout

  lengths = {
    "max_prompt_length": 2,
    "max_tokens_to_generate": 4,
    "kv_cache_size": 8,
  }
  greedy = RolloutConfig(
    **lengths, temperature=0.0, top_p=None, eos_tokens=[-1]
  )
  roles = (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)
  actor = adapted(name)
  cluster = RLCluster(
    actor=actor,
    reference=vera_jax.nnx.reference(actor),
    tokenizer=Characters(),
    cluster_config=ClusterConfig(
      role_to_mesh=dict.fromkeys(roles, one_device()),
      rollout_engine=MergedRollout,
      rollout_config=RolloutConfig(**lengths, temperature=1.0),
      training_config=RLTrainingConfig(
        actor_optimizer=optax.adam(0.1),
        max_steps=STEPS,
        **checkpoints(tmp_path),
      ),
    ),
  )
  unmerged = VanillaRollout(  # tunix's own, on the adapted model
    vera_jax.nnx.reference(actor),
    Characters(),
    CacheConfig(cache_size=8, num_layers=2, num_kv_heads=2, head_dim=4),
  )
  first = values(cluster.inference_worker.get_model("reference"), nnx.Param)

  @nnx.jit
  def logits_of(model, tokens):
    given = model_inputs(tokens)
    positions, mask = given["positions"], given["attention_mask"]
    return model(tokens, positions, None, mask)[0]

  moves = []

  def reward(prompts, completions, **others):
    """Of GRPO; and while the actor rests, a comparison of the two models."""
    del others
    trained, rollout = cluster.actor_trainer.model, cluster.rollout
    kind = (nnx.LoRAParam,)
    unmerged.update_params(nnx.state(trained, kind), kind)
    drawn, expected = (
      np.stack(engine.generate(list(DIGITS), greedy).tokens)
      for engine in (rollout, unmerged)
    )
    np.testing.assert_array_equal(drawn, expected)
    logits, expected = (
      logits_of(model, drawn)
      for model in (rollout._sampler.transformer, trained)
    )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * scale)
    moves.append(np.asarray(expected))
    return list(map(share_counted, prompts, completions))

  learner = GRPOLearner(
    cluster, GRPOConfig(num_generations=8, beta=0.01), reward_fns=reward
  )
  rng = np.random.default_rng(0)
  learner.train({"prompts": rng.choice(list(DIGITS), 16)} for _ in range(STEPS))
  assert len(moves) == STEPS
  assert all((a != b).any() for a, b in zip(moves, moves[1:], strict=False))
  trained = cluster.actor_trainer.model
  check_trained(name, trained)
  check_saved(tmp_path / "actor", trained)
  reference = cluster.inference_worker.get_model("reference")
  equal(values(reference, nnx.Param), first)
  for left, right in zip(  # the base lies in memory once
    jax.tree.leaves(nnx.state(trained, base)),
    jax.tree.leaves(nnx.state(reference, base)),
    strict=True,
  ):
    assert left is right


def engine(actor, **config):
  from tunix.rl.rollout.base_rollout import RolloutConfig

  from examples.tunix.counting import Characters
  from vera_jax.nnx.tunix import MergedRollout

  lengths = {"max_prompt_length": 2, "max_tokens_to_generate": 2}
  return MergedRollout(
    rollout_actor=actor,
    tokenizer=Characters(),
    mesh=config.pop("mesh", None),
    rollout_config=RolloutConfig(kv_cache_size=4, **lengths, **config),
  )


def test_a_rollout_that_would_ignore_the_adapter_is_an_error():
  from tunix.rl import utils

  actor = adapted("llama3")
  with pytest.raises(UserError, match="has no adapter"):
    engine(network("llama3"))
  with pytest.raises(UserError, match="leave data_type out"):
    engine(actor, data_type=jnp.bfloat16)
  with pytest.raises(UserError, match="the same mesh"):
    devices = np.array(jax.devices()[:1])
    engine(actor, mesh=jax.sharding.Mesh(devices, ("another",)))

  rollout, kind = engine(actor), (nnx.LoRAParam,)
  weights = lambda: values(rollout._sampler.transformer, nnx.Param)  # noqa: E731
  before = weights()
  rollout.update_params(nnx.state(actor, kind), kind)
  equal(weights(), before)  # nothing moved, and nothing is wrong
  assert not utils.is_sharing_weights(actor, rollout.model())  # sent again
  sent = nnx.state(actor, kind)
  sent = jax.tree.map(lambda leaf: leaf + 0.1, sent)
  with pytest.raises(UserError, match="not what the trainer sent"):
    rollout.update_params(nnx.state(actor, base), None)
  part = nnx.from_flat_state(list(nnx.to_flat_state(sent))[:-1])
  with pytest.raises(UserError, match="not what the trainer sent"):
    rollout.update_params(part, kind)
  merging = rollout._merge
  rollout._merge = lambda: rollout._sampler.transformer_state
  with pytest.raises(UserError, match="the merged weights are the same"):
    rollout.update_params(sent, kind)
  equal(weights(), before)  # an error leaves the rollout as it was
  rollout._merge = merging
  sent = jax.tree.map(lambda leaf: leaf + 0.1, sent)
  rollout.update_params(sent, kind)
  nnx.update(actor, sent)
  expected = values(vera_jax.nnx.merge(actor), nnx.Param)
  jax.tree.map(
    lambda now, then: np.testing.assert_allclose(now, then, atol=1e-6),
    weights(),
    expected,
  )
  # what is not adapted lies in memory once
  for model in (rollout.model(), rollout._sampler.transformer):
    table = model.embedder.input_embedding.get_value()
    other = actor.embedder.input_embedding.get_value()
    assert table.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()


def test_the_interfaces_of_the_installed_version():
  from tunix.generate.sampler import Sampler
  from tunix.rl import utils
  from tunix.rl.rl_cluster import ClusterConfig
  from tunix.rl.rollout.base_rollout import (
    BaseRollout,
    CacheConfig,
    RolloutConfig,
  )
  from tunix.rl.rollout.vanilla_rollout import VanillaRollout
  from tunix.sft import utils as sft_utils
  from tunix.sft.checkpoint_manager import CheckpointManager
  from tunix.sft.peft_trainer import PeftTrainer

  def parameters(function):
    return [*inspect.signature(function).parameters]

  relied_on = {
    "VanillaRollout.__init__": (
      parameters(VanillaRollout.__init__),
      ["self", "model", "tokenizer", "cache_config_or_size"],
    ),
    "update_params": (
      parameters(BaseRollout.update_params),
      ["self", "params", "filter_types"],
    ),
    "BaseRollout's abstract methods": (
      sorted(BaseRollout.__abstractmethods__ - {"__init__"}),
      [
        "eos_id",
        "generate",
        "get_per_token_logps",
        "model",
        "pad_id",
        "update_params",
      ],
    ),
    "CacheConfig": (
      parameters(CacheConfig),
      ["cache_size", "num_layers", "num_kv_heads", "head_dim"],
    ),
    "get_pytree_mesh_info": (parameters(utils.get_pytree_mesh_info), ["tree"]),
    "is_lora_enabled": (parameters(sft_utils.is_lora_enabled), ["model"]),
    "PeftTrainer": (
      parameters(PeftTrainer)[:3],
      ["model", "optimizer", "training_config"],
    ),
    "CheckpointManager.save": (
      parameters(CheckpointManager.save)[:5],
      ["self", "step", "model", "optimizer", "save_only_lora_params"],
    ),
    "RolloutConfig": (
      [
        x for x in ("kv_cache_size", "data_type") if hasattr(RolloutConfig(), x)
      ],
      ["kv_cache_size", "data_type"],
    ),
    "ClusterConfig.rollout_engine": (
      "rollout_engine" in parameters(ClusterConfig),
      True,
    ),
    "Sampler.transformer_state": (
      Sampler.transformer_state.fset is not None,
      True,
    ),
  }
  changed = {
    name: now for name, (now, then) in relied_on.items() if now != then
  }
  assert not changed, (
    f"tunix {version('google-tunix')} has other interfaces than 0.1.7, which"
    f" vera_jax.nnx.tunix and the examples rely on: {changed}"
  )


def example(name, *words):
  """What an example printed, and its exit code."""
  run = subprocess.run(
    [sys.executable, "-m", f"examples.tunix.{name}", *words],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=False,
  )
  return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize(
  ("name", "steps", "saved"), [("supervised", 20, 10), ("grpo", 20, 15)]
)
def test_an_example_learns_and_goes_on_to_the_same_bits(
  name, steps, saved, tmp_path
):
  words = (f"--workdir={tmp_path}", f"--steps={steps}")
  code, out, err = example(name, *words)
  assert code == 0, err
  if name == "grpo":
    rewards = [float(x.split()[-1]) for x in out.splitlines() if "reward" in x]
    assert len(rewards) == steps
    assert np.mean(rewards[-3:]) > 3 * np.mean(rewards[:3]), rewards
  else:
    before, after = (
      float(x.split()[-1]) for x in out.splitlines() if "share" in x
    )
    assert after > 0.9 > before

  file = tmp_path / "adapter" / "adapter.safetensors"
  whole = file.read_bytes()
  (last,) = (tmp_path / "checkpoints").rglob(f"{steps}")
  assert (last.parent / str(saved)).is_dir()
  shutil.rmtree(last)  # as if it had been stopped before
  file.unlink()
  code, out, err = example(name, *words)
  assert code == 0, err
  if name == "grpo":
    assert out.startswith(f"step {saved + 1}: reward")
  assert file.read_bytes() == whole

  code, out, err = example(name, *words, "--rank=3")
  assert code == 1
  assert "a run with other settings" in err
  settings = json.loads((tmp_path / "settings.json").read_text())
  assert settings["rank"] == 64


def test_an_example_says_what_it_needs(tmp_path):
  code, _, err = example("grpo")
  assert code == 1
  assert "--workdir=DIR" in err
  code, _, err = example("supervised", f"--workdir={tmp_path}", "--width=9")
  assert code == 2
  assert "multiple of 8" in err
