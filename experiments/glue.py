"""Fine-tune on a GLUE task, with VeRA or a baseline.

  python -m experiments.glue --config=configs/rte.py
  python -m experiments.glue --config=configs/rte.py:large --config.seed=1
  python -m experiments.glue --config=configs/cola.py --config.method=lora

The same command again goes on with an unfinished run and shows the result of a
finished one. Without network, name local folders:

  --config.model.name=FOLDER    config.json, tokenizer, model.safetensors
  --config.data.source=FOLDER   train.tsv, dev.tsv, test.tsv, or RTE/, CoLA/, …
"""

from absl import flags

from experiments import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "The run's folder. Unset: runs/TASK/METHOD-seedN-HASH, by the config.",
)


def main() -> None:
  config = cli.chosen(CONFIG)
  from vera_jax.train.loop import train_and_evaluate  # after the flags' errors

  workdir = WORKDIR.value or cli.default_workdir(config)
  result = train_and_evaluate(config, workdir)
  cli.show_result(result, workdir)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
