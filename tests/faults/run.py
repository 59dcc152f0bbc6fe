"""Fault tests: what a run survives, tried on real processes.

  python -m tests.faults.run            # writes docs/faults.md, faults.json
  python -m tests.faults.run --kills=3 --out=FOLDER

A tiny random encoder trains on generated pairs. A run that was killed, stopped,
damaged or out of disk is compared with one left alone: the last save's arrays,
metrics.jsonl, the adapter, the result.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from absl import flags

from experiments import cli
from tests.faults import (
  downloads,
  engines,
  everyday,
  four,
  interruption,
  processes,
  server,
  stores,
  sweeps,
)
from tests.faults.fixtures import Launcher, Outcome
from tests.faults.programs import TRAINING
from tests.faults.table import matrix
from tests.store import running_store
from vera_jax.errors import UserError
from vera_jax.files import read_json, write_json, write_text
from vera_jax.results import provenance

OUT = flags.DEFINE_string("out", "docs", "Where faults.md and faults.json go.")
KILLS = flags.DEFINE_integer("kills", 20, "Times of kill -9 in one run.")
TERMS = flags.DEFINE_integer("terms", 5, "Times of SIGTERM in one run.")
SWEEPS = flags.DEFINE_integer("sweeps", 10, "Sweeps that each engine trains.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random moments.")
FOLDER = flags.DEFINE_string("folder", None, "Unset: a temporary one.")
ONLY = flags.DEFINE_list(
  "only",
  [],
  "Only these groups; those of Ray need requirements-ray.txt. The others' rows"
  " stay.",
)
SWEEP = "tests/faults/sweep.py"  # of twelve runs
WORDS = {None: "not compared", True: "yes", False: "no"}


def kills(folder: Path) -> Iterator[Outcome]:
  launcher, times = Launcher(folder, epochs=3 * KILLS.value + 1), KILLS.value
  alone = launcher.run_alone()
  yield interruption.kills(launcher, alone, times=times, seed=SEED.value)


def terms(folder: Path) -> Iterator[Outcome]:
  launcher, times = Launcher(folder, epochs=3 * TERMS.value + 1), TERMS.value
  alone = launcher.run_alone()
  yield interruption.preemptions(launcher, alone, times=times, seed=SEED.value)


def harm(folder: Path) -> Iterator[Outcome]:
  launcher = Launcher(folder, epochs=3)
  alone = launcher.run_alone()
  yield from interruption.damages(launcher, alone)
  yield interruption.full_disk(launcher, alone)
  yield interruption.second_run(launcher)
  yield interruption.other_config(launcher)
  yield from downloads.downloads(launcher)


def several(folder: Path) -> Iterator[Outcome]:
  launcher = Launcher(folder, epochs=3, dropout=False)
  yield from processes.equal_layouts(launcher)
  yield from processes.stopped_by_one(launcher)
  yield from processes.left_by_one(launcher)
  yield processes.no_coordinator(launcher)


def losing(fault: Callable[..., Outcome], folder: Path) -> Iterator[Outcome]:
  options = {"times": SWEEPS.value, "seed": SEED.value}
  yield fault(Launcher(folder, epochs=3), sweep=SWEEP, **options)


def hosts(folder: Path) -> Iterator[Outcome]:
  with running_store() as running, patch.dict(os.environ, running.environment):
    launcher = Launcher(folder, epochs=2, dropout=False)
    yield from processes.killed_hosts(launcher, running, seed=SEED.value)


def store(folder: Path) -> Iterator[Outcome]:
  times, seed = KILLS.value, SEED.value
  launcher = Launcher(folder / "kills", epochs=2 * times + 1)
  with running_store() as running:
    yield stores.claimants(running, locks=20 * times)
    alone = launcher.run_alone()
    yield stores.kills(launcher, alone, running, times=times, seed=seed)
    launcher = Launcher(folder / "bad", epochs=3)
    alone = launcher.run_alone()
    for name in stores.BAD:
      yield stores.bad_store(launcher, alone, running, name)


def store_sweep(folder: Path) -> Iterator[Outcome]:
  times = KILLS.value
  launcher = Launcher(folder, epochs=4 + times // 2)
  with running_store() as running:
    yield stores.sweep_kills(launcher, running, times=times, seed=SEED.value)


def four_processes(folder: Path) -> Iterator[Outcome]:
  launcher = Launcher(folder, epochs=3, dropout=False)
  yield from four.troubles(launcher)


def sweep_by(program: str, folder: Path) -> Iterator[Outcome]:
  # so long that none of its runs ends before a signal has come to its process
  yield from sweeps.troubles(Launcher(folder, epochs=12), program)


def serving(folder: Path) -> Iterator[Outcome]:
  options = {"times": KILLS.value, "seed": SEED.value}
  yield from server.troubles(folder, **options)


def training(name: str, folder: Path) -> Iterator[Outcome]:
  """What is tried on each program that trains, but for kills."""
  launcher = TRAINING[name](folder / "once", epochs=3, dropout=False)
  alone = launcher.run_alone()
  yield interruption.second_run(launcher)
  yield from everyday.harmed(launcher, alone, seed=SEED.value)
  yield everyday.changed(launcher, alone)
  yield from everyday.clock(launcher, alone)
  yield from everyday.removed(launcher, alone)
  yield everyday.resized(launcher, alone)
  yield everyday.sleep(launcher, alone)
  launcher = TRAINING[name](folder / "saves", epochs=2 * TERMS.value + 1)
  options = {"times": TERMS.value, "seed": SEED.value}
  yield interruption.preemptions(
    launcher, launcher.run_alone(), in_saves=True, **options
  )


def killed(name: str, folder: Path) -> Iterator[Outcome]:
  times = KILLS.value
  launcher = TRAINING[name](folder, epochs=2 * times + 1)
  alone = launcher.run_alone()
  yield interruption.kills(launcher, alone, times=times, seed=SEED.value)


KINDS = (kills, terms, harm, several, hosts, store, store_sweep)
GROUPS: dict[str, Callable[[Path], Iterator[Outcome]]] = {
  **{f.__name__: f for f in KINDS},
  **{name: partial(training, name) for name in TRAINING},
  **{f"kill_{n}": partial(killed, n) for n in TRAINING if n != "classifier"},
  "kill_submitit": partial(losing, engines.by_submitit),
  "kill_ray": partial(losing, engines.by_ray),
  **{name: partial(sweep_by, name) for name in ("sweep", "submitit", "ray")},
  "four": four_processes,
  "server": serving,
}


def as_row(group: str, outcome: Outcome) -> dict[str, Any]:
  """An outcome as faults.json has it."""
  fields = outcome._asdict()
  same = fields.pop("same")
  return {"group": group, **fields, "bit_identical": same}


def table(rows: Iterable[dict[str, Any]]) -> str:
  lines = [
    "| fault | times tried | lost | bit-identical | what was seen |",
    "| --- | ---: | ---: | --- | --- |",
  ]
  for row in rows:
    same = WORDS[row["bit_identical"]]
    lines.append(
      f"| {row['fault']} | {row['tried']} | {row['lost']} | {same} |"
      f" {row['seen']} |"
    )
  return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
  versions = found["versions"]
  return f"""# Faults

For those who rely on runs being continued.

What was done to a run, how often, and what came of it. Written by
`{found["command"]}`: {found["faults"]} faults on {found["cores"]} CPU cores,
beside other work; jax {versions["jax"]}, orbax {versions["orbax-checkpoint"]}.

## Each program, each fault

{matrix(found["trials"])}

**Shown**: the adapter has the same bytes as if nothing had happened, or the
losses differ by rounding where the number of devices changed. **Refused**: one
clear sentence within a minute, and nothing is lost. **Not tried**: not yet.

## All that was tried

{table(found["trials"])}

- **Times tried** 0: left out when this page was written;
  `python -m tests.faults.run --only=GROUP` tries a group again.
- **Lost**: runs that did not go on or did not end as they should have, by the
  same command and without a hand on the folder.
- **Bit-identical**: to a run left alone, in the last save's arrays, in
  `metrics.jsonl`, in the adapter and in the result, but for their times. Over
  other numbers of devices sums are added in another order; there the losses
  are compared, and the text says how far they are apart.
- Steps done again after kill -9 are those since the last save. Saves are made
  at the end of each epoch, and when SIGTERM or Ctrl-C comes.
- The store is an emulator (`tests/store.py`). What was killed there was killed
  after a random number of its writes, and by the store's own record of all
  writes no lock was taken from a living process.
- Ray's nodes are simulated, and submitit's jobs are processes. One is lost when
  all its processes are killed at once. That no run was trained twice at once is
  by the files which processes had open, looked up five times a second.
- A store whose listings lag three seconds behind was tried, and no run came to
  its end there: in the middle of a save orbax lists what its processes have
  just written, and does not find it. The listings of Cloud Storage do not lag.
- The runs are tiny (a two-layer encoder, ten steps an epoch) and all on one
  machine. Not tried: a TPU pod, SLURM beyond its variables, and what a network
  file system does to the lock and the saves.
"""


def write(out: Path, rows: list[dict[str, Any]]) -> None:
  """Both files, after each fault test: all of them take long."""
  own = (KILLS, TERMS, SWEEPS, SEED)
  given = "".join(f" --{f.name}={f.value}" for f in own if f.present)
  found = {
    "command": f"python -m tests.faults.run{given}",
    "faults": sum(row["tried"] for row in rows),
    "cores": os.cpu_count(),
    "trials": rows,
    **provenance(),
  }
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / "faults.json", found)
  write_text(out / "faults.md", page(found))


def main() -> None:
  logging.disable(logging.WARNING)  # saves are harmed in this process, too
  chosen, out = ONLY.value or list(GROUPS), Path(OUT.value)
  unknown = [name for name in chosen if name not in GROUPS]
  if unknown:
    raise UserError(f"--only={unknown[0]}: choose from {', '.join(GROUPS)}.")
  rows: list[dict[str, Any]] = []
  earlier = out / "faults.json"
  if len(chosen) < len(GROUPS) and earlier.exists():
    rows = read_json(earlier)["trials"]
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(FOLDER.value or temporary).absolute()
    for group in chosen:
      tried = set()
      for outcome in GROUPS[group](folder / group):
        row = as_row(group, outcome)
        name = group, row["fault"]
        tried.add(name)
        rows = [r for r in rows if (r["group"], r["fault"]) != name] + [row]
        rows.sort(key=lambda row: list(GROUPS).index(row["group"]))
        write(out, rows)
        print(table([row]).splitlines()[-1], flush=True)
      # what the group tries no more
      rows = [
        r for r in rows if r["group"] != group or (group, r["fault"]) in tried
      ]
  write(out, rows)
  if any(row["lost"] for row in rows):
    raise UserError(f"Not all came through: {out / 'faults.md'}")


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
