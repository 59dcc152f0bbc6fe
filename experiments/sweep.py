"""Train a sweep: many runs in one folder, from one config.

  python -m experiments.sweep --config=configs/sweeps/rank.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/rank.py:minilm \\
    --workdir=DIR --config.base.data.source=glue_data --dry_run

The same command again goes on: finished runs are kept, unfinished ones go on
from their last save, failed ones are listed and tried again with
--retry_failed. Runs that can train together do so, at most --members at once;
each such unit has a process of its own, whose output is in DIR/logs. On several
devices a unit is split over all of them (config.base.mesh.runs). Ctrl-C and
SIGTERM save first and end with exit code 75.

--config.base.KEY=VALUE changes the base config, also where the sweep sets the
same key: --config.base.seed=0 leaves one seed.

On a cluster whose machines share DIR, an engine starts the units:

  ... --launcher=slurm \\
    --launcher_options=slurm_partition=gpu,gpus_per_node=1,timeout_min=480
  ... --launcher=ray --launcher_options=address=auto,num_gpus=1

SLURM's jobs are an array. At the end of their time they save and are put back
into the queue. They go on after Ctrl-C; the same command waits for them again.
The options are those of submitit's AutoExecutor. Ray's tasks are started again
elsewhere if their node is lost, and end with this command. With --hosts=2 each
unit is one program on two machines. On anything else each machine does its part
of the plan,

  ... --shard=$NUMBER/$COUNT

in which runs take the places of those that have ended (0/1 is the whole plan,
for one machine); or, without --shard, all take what nobody has yet: a run is
never trained twice at the same time, for its process has a lock in DIR/locks. A
dead machine's lock is free after three minutes. On a machine with several GPUs,
start one process per GPU: CUDA_VISIBLE_DEVICES=1 python -m experiments.sweep
... .

  python -m experiments.report DIR      # tables and figures, at any time
"""

import re
import sys
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.sweep.launchers import NAMES
from vera_jax.terminal import Console

if TYPE_CHECKING:
  from vera_jax.sweep.plan import SweepRun

CONFIG = cli.define_config(
  "Sweep: configs/sweeps/STUDY.py, or configs/sweeps/STUDY.py:VARIANT. Settings"
  " of its base can be changed: --config.base.optim.epochs=3."
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "The sweep's folder; on several machines a shared one."
)
DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Show the plan, its counts and an estimate; train nothing.",
)
SHARD = flags.DEFINE_string(
  "shard",
  None,
  "i/n: the i-th of n parts, i from 0, which nobody else trains; 0/1 is all."
  " Unset: what nobody has yet.",
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
LAUNCHER = flags.DEFINE_enum(
  "launcher",
  "local",
  NAMES,
  "Who starts the units: this machine, or an engine.",
)
OPTIONS = flags.DEFINE_list(
  "launcher_options",
  [],
  "KEY=VALUE,...: what the engine's jobs need. slurm: slurm_partition,"
  " gpus_per_node, cpus_per_task, mem_gb, timeout_min and others of submitit's;"
  " ray: address, num_cpus, num_gpus, TPU, memory (bytes).",
)
HOSTS = flags.DEFINE_integer(
  "hosts",
  1,
  "Machines that train one unit together, a process on each.",
  lower_bound=1,
)
DEVICES = flags.DEFINE_integer(
  "devices",
  None,
  "With --dry_run: show how the runs would be split over so many devices.",
  lower_bound=1,
)
TFLOPS = flags.DEFINE_float(
  "tflops",
  None,
  "What a worker computes, in TFLOP/s, for the estimate. Unset: as finished"
  " runs had it.",
  lower_bound=1e-6,
)

cli.define_json()


def main() -> None:
  sweep = cli.chosen(CONFIG, sweep=True)
  if not WORKDIR.value:
    raise UserError("Say where the sweep's runs go: --workdir=DIR")
  # what the command line sets in the base, no override of the sweep changes
  changes = (re.match(r"--?(?:no)?config\.base\.([\w.]+)", a) for a in sys.argv)
  fixed = {match[1] for match in changes if match}
  if DEVICES.value and not DRY_RUN.value:
    raise UserError(
      "--devices only shows, with --dry_run, how runs would be split. Training"
      " takes the devices that there are; --config.base.mesh.runs splits runs."
    )
  # Imported only now: a mistake in the flags is reported without the wait.
  cli.say_importing()
  from vera_jax import results
  from vera_jax.sweep import estimate
  from vera_jax.sweep.launchers.launcher import make_launcher
  from vera_jax.sweep.plan import (
    in_queues,
    make_plan,
    make_units,
    parse_shard,
    shard_of,
    splits,
    write_plan,
  )
  from vera_jax.sweep.runner import run_units
  from vera_jax.sweep.table import (
    LiveTable,
    counts,
    plan_table,
    seconds_left,
    states,
  )

  plan = make_plan(sweep, WORKDIR.value, fixed=fixed)
  index, count = parse_shard(SHARD.value)
  most = MEMBERS.value or sweep.members
  units = shard_of(make_units(plan.runs, most=most, shards=count), index, count)
  if SHARD.value and LAUNCHER.value == "local":  # nobody else trains these
    units = in_queues(units)
  runs = [run for unit in units for run in unit]
  if DRY_RUN.value:
    finished = filter(None, (results.read(run.folder) for run in plan.runs))
    rate = estimate.rate(finished, TFLOPS.value)
    console = Console(soft_wrap=True)
    console.print(plan_table(plan, units, rate), soft_wrap=False)
    part = f"shard {SHARD.value}: " if SHARD.value else ""
    left = estimate.span(seconds_left(units, rate))
    console.print(
      f"{part}{len(runs)} of {len(plan.runs)} runs in {len(units)} units:"
      f" {counts(states(runs))}\nleft: about {left}, {rate.source}",
    )
    if DEVICES.value:
      console.print("\n".join(splits(units, DEVICES.value, most=most)))
    return
  write_plan(plan)
  failed = failures(runs)
  if failed and not RETRY.value:
    lines = "\n".join(failed)
    cli.complain(f"{len(failed)} failed before:\n{lines}")
    cli.complain("--retry_failed tries them again.")
  logs = plan.folder / "logs"
  options = dict(option.partition("=")[::2] for option in OPTIONS.value)
  if lacking := [key for key, value in options.items() if not value]:
    raise UserError(f"--launcher_options={lacking[0]}: give KEY=VALUE,...")
  launcher = make_launcher(LAUNCHER.value, options, logs)
  with LiveTable(plan, units, tflops=TFLOPS.value) as table:
    run_units(
      units,
      launcher,
      logs=logs,
      members=most,
      hosts=HOSTS.value,
      retry_failed=RETRY.value,
      say=table.say,
      on_end=table.end,
    )
  here, everywhere = counts(states(runs)), counts(states(plan.runs))
  print(f"{here}; of the whole sweep: {everywhere}")
  cli.give(
    {
      "workdir": WORKDIR.value,
      "runs": {run.name: run.state for run in plan.runs},
    }
  )
  print(f"vera-jax report {WORKDIR.value}")
  if failed := failures(runs):
    raise UserError(
      f"{len(failed)} failed:\n" + "\n".join(failed) + f"\nLogs are in {logs};"
      " --retry_failed tries them again."
    )


def failures(runs: "list[SweepRun]") -> list[str]:
  """A line for each failed run, with the reason."""
  from vera_jax.sweep.plan import FAILED

  return [f"{r.name}: {r.failure()}" for r in runs if r.state == FAILED]


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
