"""VeRA trained on texts by tunix's PeftTrainer, which is left as it is.

  python -m examples.tunix.supervised --workdir=DIR

A tiny random Llama learns to count on from a digit. tunix's manager saves d, b
and the optimiser's state, and a run that was stopped goes on with the same
command, to the same bits. The adapter is written to DIR/adapter.
"""

from absl import flags

from examples.tunix.run_folder import run_folder
from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
STEPS = flags.DEFINE_integer("steps", 60, "Updates.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 16, "Texts.", lower_bound=1)
RATE = flags.DEFINE_float("learning_rate", 0.05, "Adam's.", lower_bound=0)
RANK = flags.DEFINE_integer("rank", 64, "VeRA's r.", lower_bound=1)
TARGETS = flags.DEFINE_list(
  "targets", [".*_proj", "lm_head"], "Patterns of the adapted layers' paths."
)
WIDTH = flags.DEFINE_integer("width", 32, "The model's.", lower_bound=8)
flags.register_validator(
  WIDTH, lambda n: n % 8 == 0, "--width must be a multiple of 8."
)
EVERY = 10  # updates from one checkpoint to the next


def main() -> None:
  settings = (BATCH, RATE, RANK, TARGETS, WIDTH)
  folder = run_folder(WORKDIR.value, {x.name: x.value for x in settings})
  # Imported only now: a mistake in the flags is reported without the wait.
  from examples.tunix import counting  # says what to install without tunix

  tokenizer = counting.Characters()
  import numpy as np
  import optax
  import orbax.checkpoint as ocp
  from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

  import vera_jax.nnx

  texts = np.array(
    [
      [tokenizer.bos_id(), *tokenizer.encode(digit + counting.count_on(digit))]
      for digit in counting.DIGITS
    ]
  )
  answers = np.arange(texts.shape[1]) > 1  # what the loss is taken of

  def batch(rows: np.ndarray) -> TrainingInput:
    return TrainingInput(texts[rows], np.tile(answers, (len(rows), 1)))

  model = vera_jax.nnx.adapt(
    counting.tiny_llama(width=WIDTH.value),
    vera_jax.vera(rank=RANK.value),
    targets=TARGETS.value,
  )
  print(vera_jax.nnx.summary(model))
  print(f"share of right characters: {counting.accuracy(model, texts):.3f}")
  trainer = PeftTrainer(
    model,
    optax.adam(RATE.value),
    TrainingConfig(
      max_steps=STEPS.value,
      eval_every_n_steps=STEPS.value,
      checkpoint_root_directory=str(folder / "checkpoints"),
      checkpointing_options=ocp.CheckpointManagerOptions(
        save_interval_steps=EVERY, max_to_keep=2
      ),
    ),
  )
  trainer.with_gen_model_input_fn(
    lambda x: vars(x) | counting.model_inputs(x.input_tokens)
  )
  if trainer.train_steps:
    print(f"goes on after step {trainer.train_steps}")
  rng = np.random.default_rng(0)
  shape = (STEPS.value, BATCH.value)
  trainer.train(list(map(batch, rng.integers(0, len(texts), shape))))
  print(f"share of right characters: {counting.accuracy(model, texts):.3f}")
  vera_jax.nnx.save(folder / "adapter", model)
  print(f"The adapter is in {folder / 'adapter'}.")


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
