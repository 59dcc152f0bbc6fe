"""Train an adapter: on a task, on your own texts or on images, by the config.

  python -m experiments.train --config=text --config.data.train=reviews.csv
  python -m experiments.train --config=rte --config.method=lora
  python -m experiments.train --config=superglue/copa --seeds=0,1,2,3,4
  python -m experiments.train --config=instruct:smollm2
    --config.data.source=FILE.json --preview             (in one line)

--config is a name of ours, perhaps with a variant behind a colon, or the path
of a file. Its config.task says what is learned. The same command again
continues an unfinished run and shows the result of a finished one. Several
seeds train at once, on one base, each in a folder of its own; with --members=N
so many, and the others wait until one has ended. Several processes share one
workdir, which all must see; a TPU pod's and SLURM's are found without flags.
RUN/adapter then answers more texts or images, and writes them.

--preview=N shows the first N examples that a decoder is tuned on, and trains
nothing. The trained tokens are in green, or between ⟦ and ⟧ where no terminal
is.
"""

import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments import cli, closing
from vera_jax.errors import UserError
from vera_jax.places import place
from vera_jax.terminal import Console, printable

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "The run's folder. Unset: runs/TASK/METHOD-seedN-HASH, by the config. With"
  " --seeds it holds a folder for each, seedN.",
)
SEEDS = flags.DEFINE_list(
  "seeds", [], "Seeds to train at once: 0,1,2,3. Unset: config.seed alone."
)
MEMBERS = flags.DEFINE_integer(
  "members",
  None,
  "Most seeds that train at once; the others wait for one to end. Unset: all.",
  lower_bound=1,
)
PROFILE = flags.DEFINE_string(
  "profile",
  None,
  "FIRST:LAST, as 10:15: trace these steps, into the run's folder"
  " (docs/profile.md). With --seeds the first seed's.",
)
PREVIEW = cli.define_optional_integer(
  "preview", 3, "Show so many training examples, and train nothing."
)
JOIN = cli.define_processes()
cli.define_json()


def main() -> None:
  config = cli.chosen(CONFIG)
  if PREVIEW.value is not None:
    show_examples(config, PREVIEW.value)
    return
  if PROFILE.value is not None:
    config.log.profile = PROFILE.value
  try:
    seeds = [int(seed) for seed in SEEDS.value]
  except ValueError as error:
    raise UserError(
      f"--seeds={','.join(SEEDS.value)}: give whole numbers, as in 0,1,2."
    ) from error
  if MEMBERS.value and not seeds:
    raise UserError("--members says how many of --seeds=0,1,... train at once.")
  cli.say_importing()
  cli.remark_idle(config, sys.argv[1:])
  JOIN()
  # Imported only now: a mistake in the flags is reported without the wait.
  from vera_jax.models.kinds import WORDS
  from vera_jax.train import distributed
  from vera_jax.train.ensemble import train_ensemble
  from vera_jax.train.loop import train_and_evaluate

  if not seeds:
    workdir = WORKDIR.value or cli.default_workdir(config)
    result = train_and_evaluate(config, workdir)
    if distributed.is_first():
      cli.give(result)
      closing.show_result(result, workdir)
      writes = result["kind"] == WORDS
      asked = "generate --prompt=TEXT" if writes else "predict --input=FILE"
      Console().print(f"vera-jax {asked} --adapter={workdir}/adapter")
      closing.show_trace(config, [workdir])
    return

  configs = cli.with_seeds(config, seeds)
  workdirs = [
    place(WORKDIR.value) / f"seed{config.seed}"
    if WORKDIR.value
    else cli.default_workdir(config)
    for config in configs
  ]
  results = train_ensemble(configs, workdirs, members=MEMBERS.value)
  if distributed.is_first():
    cli.give({"runs": results})
    closing.show_seeds(results, workdirs)
    closing.show_trace(config, workdirs)
  failed = [
    f"seed {r['seed']}: {r['failed']}" for r in results if "failed" in r
  ]
  if failed:
    raise UserError("\n".join(failed))


def show_examples(config: ConfigDict, number: int) -> None:
  """Print the first training examples as a decoder is trained on them."""
  if number < 1:
    raise UserError(f"--preview={number}; give 1 or more.")
  # Imported only now: a mistake in the flags is reported without the wait.
  cli.say_importing()
  from vera_jax.data.preview import preview
  from vera_jax.data.tokenizer import load_tokenizer
  from vera_jax.models.folder import resolve
  from vera_jax.tasks.task import task_for
  from vera_jax.train.config import check_settings

  check_settings(config)
  if "template" not in config.data:
    raise UserError(
      "--preview shows what a decoder is tuned on by configs/instruct.py;"
      f" config.task={config.task} has no such thing."
    )
  config.data.max_test_examples = 0  # nothing is written, nor scored
  task: Any = task_for(config)
  folder = resolve(config.model.name)
  data = task.load(config, folder)
  for line in (*task.presentation.notes, *data.introduction()):
    print(printable(line))
  tokens = data.tokens["train"]
  preview(tokens, load_tokenizer(folder), number=number)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
