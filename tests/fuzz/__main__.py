"""Harmed files for every reader of files that come from elsewhere.

  python -m tests.fuzz --minutes=60               # others each time
  python -m tests.fuzz --minutes=60 --out=docs    # writes docs/fuzz.md too
  python -m tests.fuzz --reader=E2E --number=17   # one of them again

Each reader has a process of its own, so that a crash, a hang or a full memory
ends that process alone, which is a finding too. The harmed file of a finding is
kept in `found/`, where `test_fuzz.py` has it read for ever.
"""

import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from tests.fuzz.harness import FINE, LONGEST, REFUSED, ROOT, Attempt, Sandbox
from tests.fuzz.readers import READERS
from vera_jax.errors import UserError
from vera_jax.files import read_json, write_json, write_text

COUNT = flags.DEFINE_integer("count", 1000, "Mutations of each reader.", 1)
MINUTES = flags.DEFINE_float("minutes", None, "In place of --count.", 0)
READER = flags.DEFINE_list(
  "reader", list(READERS), "Only these; the others' rows in --out stay."
)
SEED = flags.DEFINE_integer(
  "seed", 0, "Of the mutations. Unset, with --minutes: another each time."
)
FIRST = flags.DEFINE_integer("first", 0, "The first mutation's number.", 0)
NUMBER = flags.DEFINE_integer("number", None, "This mutation alone.", 0)
OUT = flags.DEFINE_string("out", None, "Where fuzz.json and fuzz.md go, if so.")
HANG = flags.DEFINE_integer(
  "hang", 30, "Seconds after which a reader is ended; more beside other work."
)
HERE = flags.DEFINE_bool("here", False, "Try one reader's in this process.")
ROUND = 200  # of a reader with --minutes, before it is the next one's turn
SPACE = 4 * 2**30  # bytes that a reader may ask for, at the most


def try_here(reader: str) -> None:
  """Print the outcome of each mutation as a line of JSON."""
  lines = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what is read may print
  with tempfile.TemporaryDirectory() as folder:
    sandbox = Sandbox(Path(folder), reader)
    sandbox.read_clean()  # imports and compiles
    clean = sandbox.read_clean()
    print(json.dumps(clean), file=lines)
    if clean.outcome != FINE:
      return
    used = int(Path("/proc/self/statm").read_text().split()[0])
    most = used * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in range(FIRST.value, FIRST.value + COUNT.value):
      faulthandler.dump_traceback_later(HANG.value, exit=True)
      found = sandbox.attempt(number, seed=SEED.value)
      faulthandler.cancel_dump_traceback_later()
      if found.is_finding:
        sandbox.keep(f"{SEED.value}-{number}")
      print(json.dumps(found), file=lines)


def attempts(reader: str, first: int, count: int) -> Iterator[Attempt]:
  """The outcomes, from a process that is begun again where it ends early."""
  end, environment = first + count, {"JAX_PLATFORMS": "cpu"}
  environment |= {"HF_HUB_OFFLINE": "1", **os.environ}
  while first < end:
    given = [f"--first={first}", f"--count={end - first}"]
    given += [f"--seed={SEED.value}", f"--reader={reader}", "--here"]
    given += [f"--hang={HANG.value}"]
    with tempfile.TemporaryFile("w+") as said:
      child = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz", *given],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
      )
      clean = Attempt(-1, "nothing", "the clean files can't be read", 0.0, 0)
      with child:
        for line in child.stdout or ():
          found = Attempt(*json.loads(line))
          if found.number >= 0:
            first = found.number + 1
            yield found
          else:
            clean = found
      said.seek(0)
      lines = said.read().splitlines()
    own = [line.strip() for line in lines if str(ROOT) in line][:3]
    last = f"{lines[-1] if lines else ''} ({' < '.join(own)})"
    if clean.outcome != FINE:
      raise UserError(f"{reader}, clean: {clean.outcome} {last}")
    if first < end:
      outcome = f"its process ended with {child.returncode}: {last}"
      with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder), reader)
        done = sandbox.harm(first, seed=SEED.value)
        sandbox.keep(f"{SEED.value}-{first}")
      yield Attempt(first, done, outcome, 0.0, 0)
      first += 1


def fuzz(reader: str, first: int, count: int) -> dict[str, Any]:
  """A row of the table; each finding is printed once per place."""
  row: dict[str, Any] = {"reader": reader, "tried": 0, FINE: 0, REFUSED: 0}
  row["seed"] = SEED.value
  row |= {"findings": 0, "seconds": 0.0, "memory": 0}
  places: dict[str, int] = {}
  for found in attempts(reader, first, count):
    row["tried"] += 1
    row["seconds"] = max(row["seconds"], round(found.seconds, 1))
    row["memory"] = max(row["memory"], found.memory)
    if found.outcome in (FINE, REFUSED):
      row[found.outcome] += 1
      continue
    row["findings"] += 1
    place = found.outcome.partition(":")[0] + found.outcome.rpartition("(")[2]
    places[place] = places.get(place, 0) + 1
    if places[place] == 1:
      again = f"--reader={reader!r} --seed={SEED.value} --number={found.number}"
      print(f"{found.done}: {found.outcome}\n  {again}", flush=True)
  shown = {key: x for key, x in row.items() if key != "memory"}
  print(*(f"{key} {x}" for key, x in shown.items()), sep=", ", flush=True)
  return row


def page(found: dict[str, Any]) -> str:
  rows = [
    f"| {row['reader']} | {row['tried']:,} | {row[FINE]:,} | {row[REFUSED]:,} |"
    f" {row['findings']} | {row['seconds']:.1f} | {row['memory'] / 1e6:,.0f} |"
    for row in found["rows"]
  ]
  table, seed = "\n".join(rows), found["seed"]
  now = sum(row["seed"] == seed for row in found["rows"])
  others = len(rows) - now
  rest = f"; {others} rows are of earlier ones" * bool(others)
  return f"""# Harmed files

For those who read files of strangers.

Files of every kind that the project reads, and what is asked of the server,
each with one change: bits, a cut, a number; a value of JSON, left out, of
another type, nested or extreme; a cell of a table, a part of a chat template, a
length, type or offset of a header; or a link, a device, a pipe or a folder in
the file's place. Written by `{found["command"]}`:
{now} readers were tried by it, with seed {seed}{rest}.

| reader | tried | read all the same | refused | findings | seconds | MB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

- **Refused**: by an error of at most {LONGEST} characters per line that says
  what is wrong with the file.
- **Findings**: any other exception; a program started, a connection made; a
  device or a file outside of the folder opened; 10 s or 2 GB more than for the
  clean files; a crash; no end within {HANG.value} s.
- **Seconds**, **MB**: the most processor time and memory of one reading.
- `tests/fuzz/readers.py` has the list of what is tried. A test holds that each
  function of the package that opens such a file is reached by it, and that each
  family, method and format is in it.
- Files of findings are kept in `tests/fuzz/found/`, and the tests read them.
- Commands, mistyped, starved and interrupted, are tried by
  `python -m tests.fuzz.commands`; by `--disk` each on a full disk.
"""


def main() -> None:
  unknown = [name for name in READER.value if name not in READERS]
  if unknown:
    raise UserError(f"--reader={unknown[0]}: choose from {', '.join(READERS)}.")
  if HERE.value:
    try_here(READER.value[0])
    return
  if MINUTES.value and not SEED.present:
    flags.FLAGS["seed"].value = int(time.time())
  first, count = FIRST.value, COUNT.value
  if NUMBER.value is not None:
    first, count = NUMBER.value, 1
  earlier = Path(OUT.value) / "fuzz.json" if OUT.value else None
  rows: dict[str, dict[str, Any]] = {}
  if earlier is not None and earlier.exists():
    rows = {row["reader"]: row for row in read_json(earlier)["rows"]}
  tried: dict[str, dict[str, Any]] = {}
  until = time.monotonic() + 60 * (MINUTES.value or 0)
  while not tried or (MINUTES.value and time.monotonic() < until):
    for reader in READER.value:
      if MINUTES.value and tried and time.monotonic() > until:
        break
      row = fuzz(reader, first, ROUND if MINUTES.value else count)
      tried[reader] = _sum(tried.get(reader), row)
      if OUT.value:
        write(Path(OUT.value), rows | tried)
    first += ROUND
  if total := sum(row["findings"] for row in tried.values()):
    raise UserError(f"{total} findings.")


def write(out: Path, rows: dict[str, dict[str, Any]]) -> None:
  """Both files, after each reader: all of them take long."""
  own = (MINUTES, COUNT, SEED, FIRST, HANG)
  given = "".join(f" --{f.name}={f.value}" for f in own if f.present)
  found = {
    "command": f"python -m tests.fuzz{given} --out=docs",
    "seed": SEED.value,
    "rows": [rows[name] for name in READERS if name in rows],
  }
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / "fuzz.json", found)
  write_text(out / "fuzz.md", page(found))


def _sum(one: dict[str, Any] | None, two: dict[str, Any]) -> dict[str, Any]:
  """Two rows of a reader as one."""
  if one is None:
    return two
  return {
    key: x
    if isinstance(x, str)
    else max(x, two[key])
    if key in ("seconds", "memory", "seed")
    else x + two[key]
    for key, x in one.items()
  }


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
