"""VeRA by reinforcement learning: tunix's GRPO, with a reward that is checked.

  python -m examples.tunix.grpo --workdir=DIR

A tiny random Llama learns to count on from a digit: the reward is the share of
characters that follow the one before. The rollouts are drawn from weights into
which the adapter is merged. A run that was stopped goes on with the same
command. The adapter is written to DIR/adapter.
"""

from absl import flags

from examples.tunix.run_folder import run_folder
from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
STEPS = flags.DEFINE_integer("steps", 30, "Updates.", lower_bound=1)
PROMPTS = flags.DEFINE_integer("prompts", 16, "Per update.", lower_bound=1)
ANSWERS = flags.DEFINE_integer("answers", 8, "Per prompt.", lower_bound=2)
RATE = flags.DEFINE_float("learning_rate", 0.05, "Adam's.", lower_bound=0)
BETA = flags.DEFINE_float("beta", 0.01, "Of the KL penalty.", lower_bound=0)
RANK = flags.DEFINE_integer("rank", 64, "VeRA's r.", lower_bound=1)
TARGETS = flags.DEFINE_list(
  "targets", [".*_proj", "lm_head"], "Patterns of the adapted layers' paths."
)
WIDTH = flags.DEFINE_integer("width", 32, "The model's.", lower_bound=8)
flags.register_validator(
  WIDTH, lambda n: n % 8 == 0, "--width must be a multiple of 8."
)


def main() -> None:
  settings = (PROMPTS, ANSWERS, RATE, BETA, RANK, TARGETS, WIDTH)
  folder = run_folder(WORKDIR.value, {x.name: x.value for x in settings})
  # Imported only now: a mistake in the flags is reported without the wait.
  from examples.tunix import counting  # says what to install without tunix

  mesh = counting.one_device()
  import numpy as np
  import optax
  import orbax.checkpoint as ocp
  from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
  from tunix.rl.rl_cluster import (
    ClusterConfig,
    RLCluster,
    RLTrainingConfig,
    Role,
  )
  from tunix.rl.rollout.base_rollout import RolloutConfig

  import vera_jax.nnx
  from vera_jax.nnx.tunix import MergedRollout

  actor = vera_jax.nnx.adapt(
    counting.tiny_llama(width=WIDTH.value),
    vera_jax.vera(rank=RANK.value),
    targets=TARGETS.value,
  )
  counting.put_on(mesh, actor)
  cluster = RLCluster(
    actor=actor,
    reference=vera_jax.nnx.reference(actor),
    tokenizer=counting.Characters(),
    cluster_config=ClusterConfig(
      role_to_mesh={
        role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)
      },
      rollout_engine=MergedRollout,
      rollout_config=RolloutConfig(
        max_prompt_length=2,  # the start of a text, and a digit
        max_tokens_to_generate=counting.LENGTH,
        kv_cache_size=8,
        temperature=1.0,
      ),
      training_config=RLTrainingConfig(
        actor_optimizer=optax.adam(RATE.value),
        max_steps=STEPS.value,
        eval_every_n_steps=STEPS.value,
        checkpoint_root_directory=str(folder / "checkpoints"),
        checkpointing_options=ocp.CheckpointManagerOptions(
          save_interval_steps=5, max_to_keep=2
        ),
      ),
    ),
  )
  # The trainer has restored its leaves by now; tunix sends them to the rollout
  # after an update only.
  cluster.sync_weights()
  step = cluster.actor_trainer.train_steps

  def reward(prompts, completions, **others):
    del others
    nonlocal step
    rewards = list(map(counting.share_counted, prompts, completions))
    step += 1
    print(f"step {step}: reward {np.mean(rewards):.3f}", flush=True)
    return rewards

  learner = GRPOLearner(
    cluster,
    GRPOConfig(num_generations=ANSWERS.value, beta=BETA.value),
    reward_fns=reward,
  )
  rng = np.random.default_rng(0)
  learner.train(
    {"prompts": rng.choice(list(counting.DIGITS), PROMPTS.value)}
    for _ in range(STEPS.value)
  )
  vera_jax.nnx.save(folder / "adapter", cluster.actor_trainer.model)
  print(f"The adapter is in {folder / 'adapter'}.")


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
