"""What a run survives: each fault is tried on real processes.

  python -m tests.faults.run            # writes docs/faults.md, faults.json
  python -m tests.faults.run --kills=3 --out=FOLDER

A tiny random encoder trains on generated pairs. A run that was killed, stopped,
harmed or starved is compared with one left alone: the last save's arrays,
metrics.jsonl, the adapter, the result.
"""

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from tests.faults import downloads, interruption, processes
from tests.faults.ground import Ground, Trial
from vera_jax.errors import UserError
from vera_jax.files import read_json, write_json, write_text
from vera_jax.results import provenance

OUT = flags.DEFINE_string("out", "docs", "Where faults.md and faults.json go.")
KILLS = flags.DEFINE_integer("kills", 20, "kill -9 so often in one run.")
TERMS = flags.DEFINE_integer("terms", 5, "SIGTERM so often in one run.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random moments.")
FOLDER = flags.DEFINE_string("folder", None, "Unset: one that goes afterwards.")
ONLY = flags.DEFINE_list(
  "only",
  [],
  "Try these groups alone: kills, terms, harm, several. The others' rows stay.",
)
WORDS = {None: "not compared", True: "yes", False: "no"}


def kills(folder: Path) -> Iterator[Trial]:
  ground = Ground(folder, epochs=3 * KILLS.value + 1)
  alone, seed = _alone(ground), SEED.value
  yield interruption.kills(ground, alone, times=KILLS.value, seed=seed)


def terms(folder: Path) -> Iterator[Trial]:
  ground = Ground(folder, epochs=3 * TERMS.value + 1)
  alone, seed = _alone(ground), SEED.value
  yield interruption.preemptions(ground, alone, times=TERMS.value, seed=seed)


def harm(folder: Path) -> Iterator[Trial]:
  ground = Ground(folder, epochs=3)
  alone = _alone(ground)
  yield from interruption.damages(ground, alone)
  yield interruption.full_disk(ground, alone)
  yield interruption.second_run(ground)
  yield interruption.other_config(ground)
  yield from downloads.downloads(ground)


def several(folder: Path) -> Iterator[Trial]:
  ground = Ground(folder, epochs=3, dropout=False)
  yield from processes.equal_layouts(ground)
  yield from processes.stopped_by_one(ground)
  yield from processes.left_by_one(ground)
  yield processes.no_coordinator(ground)


GROUPS = {f.__name__: f for f in (kills, terms, harm, several)}


def _alone(ground: Ground) -> Path:
  workdir = ground.folder / "alone"
  ended = ground.run(workdir)
  if ended.code:
    raise UserError(f"The run left alone failed:\n{ended.told}")
  return workdir


def as_row(group: str, trial: Trial) -> dict[str, Any]:
  same, others = trial.same, trial._asdict()
  del others["same"]
  return {"group": group, **others, "bit_identical": same}


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

What was done to a run, how often, and what came of it. Written by
`{found["command"]}`: {found["faults"]} faults on {found["cores"]} CPU cores,
beside other work; jax {versions["jax"]}, orbax {versions["orbax-checkpoint"]}.

{table(found["trials"])}
{found.get("note", "")}
- **Times tried** 0: left out when this page was written;
  `python -m tests.faults.run --only=GROUP` tries a group again.
- **Lost**: runs that did not go on or did not end as they should have, by the
  same command and without a hand on the folder.
- **Bit-identical**: to a run left alone, in the last save's arrays, in
  `metrics.jsonl`, in the adapter and in the result but for its seconds. Over
  other numbers of devices sums are added in another order; there the losses
  are compared, and the text says how far they are apart.
- Steps done again after kill -9 are those since the last save. Saves are made
  at the end of each epoch, and when SIGTERM or Ctrl-C comes.
- The runs are tiny (a two-layer encoder, ten steps an epoch) and all on one
  machine. Not tried: a TPU pod, SLURM beyond its variables, and what a network
  file system does to the lock and the saves.
"""


def write(out: Path, rows: list[dict[str, Any]]) -> None:
  """Both files, after each trial: a run of this is long."""
  own = (KILLS, TERMS, SEED)
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


def kept(file: Path, chosen: Collection[str]) -> list[dict[str, Any]]:
  """The rows of an earlier run that are not tried again."""
  if len(chosen) == len(GROUPS) or not file.exists():
    return []
  rows = read_json(file)["trials"]
  return [row for row in rows if row["group"] not in chosen]


def main() -> None:
  chosen, out = ONLY.value or list(GROUPS), Path(OUT.value)
  unknown = [name for name in chosen if name not in GROUPS]
  if unknown:
    raise UserError(f"--only={unknown[0]}: choose from {', '.join(GROUPS)}.")
  rows = kept(out / "faults.json", chosen)
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(FOLDER.value or temporary).absolute()
    for group in chosen:
      for trial in GROUPS[group](folder / group):
        rows.append(as_row(group, trial))
        rows.sort(key=lambda row: list(GROUPS).index(row["group"]))
        write(out, rows)
        print(table([as_row(group, trial)]).splitlines()[-1], flush=True)
  if any(row["lost"] for row in rows):
    raise UserError(f"Not all came through: {out / 'faults.md'}")


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
