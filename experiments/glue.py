"""Fine-tune on a GLUE task, or SuperGLUE's, with VeRA or a baseline.

  python -m experiments.glue --config=configs/rte.py
  python -m experiments.glue --config=configs/rte.py:large --config.seed=1
  python -m experiments.glue --config=configs/cola.py --config.method=lora
  python -m experiments.glue --config=configs/superglue/copa.py
  python -m experiments.glue --config=configs/rte.py --seeds=0,1,2,3,4
  python -m experiments.glue --config=configs/rte.py --num_processes=2
    --coordinator=HOST:PORT --process_id=0    (in one line; the other with 1)

The same command again continues an unfinished run and shows the result of a
finished one. Several seeds train at once, on one base, each in a folder of its
own; with --members=N so many, and the others wait until one has ended. Several
processes share one workdir, which all must see; a TPU pod's and SLURM's are
found without flags. Without network, name local folders:

  --config.model.name=FOLDER    config.json, tokenizer, model.safetensors
  --config.data.source=FOLDER   train.tsv, dev.tsv, test.tsv, or RTE/, CoLA/, …
                                (SuperGLUE: train.jsonl, val.jsonl, test.jsonl)
"""

import sys

from absl import flags

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.places import place
from vera_jax.train import distributed

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
JOIN = cli.define_processes()


def main() -> None:
  config = cli.chosen(CONFIG)
  cli.remark_idle(config, sys.argv[1:])
  if PROFILE.value is not None:
    config.log.profile = PROFILE.value
  JOIN()
  try:
    seeds = [int(seed) for seed in SEEDS.value]
  except ValueError as error:
    raise UserError(
      f"--seeds={','.join(SEEDS.value)}: give whole numbers, as in 0,1,2."
    ) from error
  if MEMBERS.value and not seeds:
    raise UserError("--members says how many of --seeds=0,1,... train at once.")
  # Imported only now: a mistake in the flags is reported without the wait.
  from vera_jax.train.ensemble import train_ensemble
  from vera_jax.train.loop import train_and_evaluate

  if not seeds:
    workdir = WORKDIR.value or cli.default_workdir(config)
    result = train_and_evaluate(config, workdir)
    if distributed.is_first():
      cli.show_result(result, workdir)
      cli.show_trace(config, [workdir])
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
    cli.show_seeds(results, workdirs)
    cli.show_trace(config, workdirs)
  failed = [
    f"seed {r['seed']}: {r['failed']}" for r in results if "failed" in r
  ]
  if failed:
    raise UserError("\n".join(failed))


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
