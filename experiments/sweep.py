"""Train a sweep: many runs in one folder, from one config.

  python -m experiments.sweep --config=configs/sweeps/rank.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/rank.py:minilm \\
    --workdir=DIR --config.base.data.source=glue_data --dry_run

The same command again goes on: finished runs are kept, unfinished ones go on
from their last save, failed ones are told and tried again with --retry_failed.
Runs that can train together do so, at most --members at once; each unit of them
has a process of its own, whose output is in DIR/logs. Ctrl-C and SIGTERM save
first and end with exit code 75.

--config.base.KEY=VALUE changes the base config, and overrules the sweep where
that sets the same key: --config.base.seed=0 leaves one seed.

Several machines with a shared folder: each does its part of the plan,

  #SBATCH --array=0-7 --requeue --signal=TERM@120
  srun python -m experiments.sweep --config=configs/sweeps/glue.py:large \\
    --workdir=/shared/glue --shard=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

or, without --shard, all take what nobody has yet: a run is never trained twice
at the same time, for its process holds a lock in DIR/locks. A dead machine's
lock is void after three minutes. On a machine with several GPUs, start one
process a GPU: CUDA_VISIBLE_DEVICES=1 python -m experiments.sweep ... . On pod
slices, one shard a slice, each slice a single host.

  python -m experiments.report DIR      # tables and figures, also of a half
"""

import re
import sys

from absl import flags
from rich.console import Console
from vera_jax.sweep.conduct import conduct

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.sweep import estimate
from vera_jax.sweep.plan import (
  FAILED,
  Plan,
  Unit,
  make_plan,
  parse_shard,
  shard_of,
  units,
  write_about,
)
from vera_jax.sweep.table import (
  Finished,
  LiveTable,
  counts,
  plan_table,
  seconds_left,
)

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string(
  "workdir", None, "The sweep's folder; on several machines a shared one."
)
DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Show the plan, its counts and an estimate; train nothing.",
)
SHARD = flags.DEFINE_string(
  "shard", None, "i/n: the i-th of n parts, i from 0. Unset: all."
)
RETRY = flags.DEFINE_bool(
  "retry_failed", False, "Try failed runs again, from their last good save."
)
MEMBERS = flags.DEFINE_integer(
  "members",
  None,
  "Most runs that train at once; unset: the sweep's own. 1 needs least memory.",
  lower_bound=1,
)
TFLOPS = flags.DEFINE_float(
  "tflops",
  None,
  "What a worker computes, in TFLOP/s, for the estimate. Unset: as finished"
  " runs had it.",
  lower_bound=1e-6,
)


def main() -> None:
  sweep = cli.chosen(CONFIG)
  if "overrides" not in sweep:
    raise UserError(
      "--config names a single run's settings: `python -m experiments.glue`"
      " trains it. Sweeps are configs/sweeps/NAME.py."
    )
  if not WORKDIR.value:
    raise UserError("Say where the sweep's runs go: --workdir=DIR")
  plan = make_plan(sweep, WORKDIR.value, fixed=_given(sys.argv[1:]))
  index, count = parse_shard(SHARD.value)
  members = MEMBERS.value or sweep.members
  mine = shard_of(units(plan.runs, members=members, shards=count), index, count)
  if DRY_RUN.value:
    return show(plan, mine)
  write_about(plan)
  if not RETRY.value:
    _tell_failures(plan, mine)
  with LiveTable(plan, mine, tflops=TFLOPS.value) as table:
    conduct(
      mine,
      logs=plan.folder / "logs",
      retry_failed=RETRY.value,
      watcher=table,
    )
  _conclude(plan, mine)


def _given(arguments: list[str]) -> set[str]:
  """The keys of the base that the command line sets."""
  found = (re.match(r"--?(?:no)?config\.base\.([\w.]+)", a) for a in arguments)
  return {match[1] for match in found if match}


def show(plan: Plan, mine: list[Unit]) -> None:
  """The plan with counts and an estimate."""
  console = Console()
  rate = estimate.rate(Finished(plan)(), TFLOPS.value)
  console.print(plan_table(plan, mine, rate))
  runs = [run for unit in mine for run in unit]
  part = f"shard {SHARD.value}: " if SHARD.value else ""
  left = seconds_left(mine, rate)
  console.print(
    f"{part}{len(runs)} of {len(plan.runs)} runs in {len(mine)} units:"
    f" {counts(runs)}",
    highlight=False,
  )
  console.print(
    f"left: about {estimate.span(left)}, {rate.source}",
    highlight=False,
    markup=False,
    soft_wrap=True,
  )


def _failed(mine: list[Unit]) -> list[str]:
  runs = [run for unit in mine for run in unit if run.state == FAILED]
  return [f"{run.name}: {run.failure()}" for run in runs]


def _tell_failures(plan: Plan, mine: list[Unit]) -> None:
  failed = _failed(mine)
  if failed:
    print(f"{len(failed)} failed before:", *failed, sep="\n", file=sys.stderr)
    print("--retry_failed tries them again.", file=sys.stderr)


def _conclude(plan: Plan, mine: list[Unit]) -> None:
  runs = [run for unit in mine for run in unit]
  print(f"{counts(runs)}; of the whole sweep: {counts(plan.runs)}")
  print(f"python -m experiments.report {WORKDIR.value}")
  failed = _failed(mine)
  if failed:
    raise UserError(
      f"{len(failed)} failed:\n" + "\n".join(failed) + "\nLogs are in"
      f" {plan.folder / 'logs'}; --retry_failed tries them again."
    )


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
