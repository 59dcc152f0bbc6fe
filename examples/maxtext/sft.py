"""VeRA on a model of MaxText, trained by MaxText's own supervised trainer.

  python -m examples.maxtext.sft CONFIG.yml model_name=... steps=... ...

The arguments are those of `maxtext.trainers.post_train.sft.train_sft`, whose
steps these are. The checkpoints hold d, b and the optimiser's state; the same
command goes on from the last one.
"""

import sys
from collections.abc import Sequence

import jax
import optax
import pathwaysutils
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import NamedSharding, PartitionSpec
from maxtext.configs import pyconfig
from maxtext.optimizers import optimizers
from maxtext.trainers.post_train.sft import hooks, train_sft
from maxtext.utils import maxtext_utils, model_creation_utils

import vera_jax
import vera_jax.nnx

ADAPTER = vera_jax.vera(rank=256)
TARGETS = ["query", "value"]


def main(arguments: Sequence[str]) -> nnx.Module:
  """Trains, and writes the adapter's folder beside the checkpoints."""
  config = pyconfig.initialize(["sft", *arguments])
  train_sft.validate_config(config)
  model, mesh = model_creation_utils.from_pretrained(config)
  with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
    vera_jax.nnx.adapt(model, ADAPTER, targets=TARGETS)
    leaves = nnx.state(model, nnx.LoRAParam)
    everywhere = NamedSharding(mesh, PartitionSpec())
    nnx.update(model, jax.device_put(leaves, everywhere))
    print(vera_jax.nnx.summary(model))

    schedule = maxtext_utils.create_learning_rate_schedule(config)
    optimiser = optimizers.get_optimizer(config, schedule, model)
    if config.gradient_clipping_threshold > 0:
      clip = optax.clip_by_global_norm(config.gradient_clipping_threshold)
      optimiser = optax.chain(clip, optimiser)
    trainer = train_sft.MaxTextPeftTrainer(
      model, optimiser, train_sft.get_tunix_config(config)
    )
    trainer.with_training_hooks(
      hooks.SFTTrainingHooks(config, mesh, schedule, None)
    )
    trainer.with_data_hooks(hooks.SFTDataHooks(config, mesh, None))
    train_sft.use_maxtext_loss_function(trainer, config)
  train_sft.train_model(config, trainer, mesh)
  if trainer.train_steps < config.steps:  # MaxText only logs a failed read
    raise SystemExit(f"The data ended after {trainer.train_steps} steps.")
  if jax.process_count() == 1:  # a process must see all weights
    folder = config.checkpoint_dir.rstrip("/").rpartition("/")[0]
    vera_jax.nnx.save(f"{folder}/adapter", model)
  return model


if __name__ == "__main__":
  pathwaysutils.initialize()
  main(sys.argv[1:])
