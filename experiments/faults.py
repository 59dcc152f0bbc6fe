"""What a run survives: each fault is tried on real processes.

  python -m experiments.faults            # writes docs/faults.md, faults.json
  python -m experiments.faults --kills=3 --out=FOLDER

A tiny random encoder trains on generated pairs. A run that was killed, stopped,
harmed or starved is compared with one left alone: the last save's arrays,
metrics.jsonl, the adapter, the result.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.trials import downloads, interruption, processes
from experiments.trials.ground import Ground, Trial
from vera_jax.errors import UserError
from vera_jax.results import provenance
from vera_jax.workdir import write_json, write_text

OUT = flags.DEFINE_string("out", "docs", "Where faults.md and faults.json go.")
KILLS = flags.DEFINE_integer("kills", 20, "kill -9 so often in one run.")
TERMS = flags.DEFINE_integer("terms", 5, "SIGTERM so often in one run.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random moments.")
FOLDER = flags.DEFINE_string("folder", None, "Unset: one that goes afterwards.")
WORDS = {None: "not compared", True: "yes", False: "no"}


def trials(
  folder: Path, *, kills: int, terms: int, seed: int
) -> Iterator[Trial]:
  """Every fault in turn."""
  long = Ground(folder / "long", epochs=3 * kills + 1)
  alone = long.folder / "alone"
  _whole(long, alone)
  yield interruption.kills(long, alone, times=kills, seed=seed)
  long = Ground(folder / "terms", epochs=3 * terms + 1)
  alone = long.folder / "alone"
  _whole(long, alone)
  yield interruption.preemptions(long, alone, times=terms, seed=seed)
  short = Ground(folder / "short", epochs=3)
  alone = short.folder / "alone"
  _whole(short, alone)
  yield from interruption.damages(short, alone, times=len(interruption.DAMAGES))
  yield interruption.full_disk(short, alone)
  yield interruption.second_run(short)
  yield interruption.other_config(short)
  yield from downloads.downloads(short)
  several = Ground(folder / "several", epochs=3, dropout=False)
  yield from processes.equal_layouts(several)
  yield from processes.stopped_by_one(several)
  yield from processes.left_by_one(several)
  yield processes.no_coordinator(several)


def _whole(ground: Ground, workdir: Path) -> None:
  ended = ground.run(workdir)
  if ended.code:
    raise UserError(f"The run left alone failed:\n{ended.told}")


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
`{found["command"]}`: {found["faults"]} faults in
{found["seconds"] / 60:.0f} minutes on {found["cores"]} CPU cores, beside other
work; jax {versions["jax"]}, orbax {versions["orbax-checkpoint"]}.

{table(found["trials"])}

- **Lost**: runs that did not go on or did not end as they should have, by the
  same command and without a hand on the folder.
- **Bit-identical**: to a run left alone, in the last save's arrays, in
  `metrics.jsonl`, in the adapter and in the result but for its seconds. Over
  other numbers of devices sums are added in another order; there the losses
  are compared, and the text says how far they are apart.
- Steps done again after kill -9 are those since the last save. Saves are made
  at the end of each epoch, and when SIGTERM or Ctrl-C comes.
- The runs are tiny ({found["steps"]} steps and fewer of a two-layer encoder),
  and all on one machine. Not tried: a TPU pod, SLURM beyond its variables, and
  what a network file system does to the lock and the saves.
"""


def main() -> None:
  started, rows = time.monotonic(), []
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(FOLDER.value or temporary).absolute()
    settings = {"kills": KILLS.value, "terms": TERMS.value, "seed": SEED.value}
    for trial in trials(folder, **settings):
      rows.append({**trial._asdict(), "bit_identical": trial.same})
      del rows[-1]["same"]
      print(table(rows[-1:]).splitlines()[-1], flush=True)
  given = [f" --{k}={v}" for k, v in settings.items() if flags.FLAGS[k].present]
  found = {
    "command": "python -m experiments.faults" + "".join(given),
    "faults": sum(row["tried"] for row in rows),
    "seconds": round(time.monotonic() - started),
    "cores": os.cpu_count(),
    "steps": 10 * (3 * KILLS.value + 1),
    "trials": rows,
    **provenance(),
  }
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / "faults.json", json.loads(json.dumps(found)))
  write_text(out / "faults.md", page(found))
  if any(row["lost"] or row["bit_identical"] is False for row in rows):
    raise UserError(f"Not all came through: {out / 'faults.md'}")


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
