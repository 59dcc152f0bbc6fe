"""Runs and sweeps in an object store: kills, many at once, a bad store."""

import json
import math
import os
import random
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.faults.engines import kill_tree, unequal
from tests.faults.fixtures import (
  ROOT,
  Launcher,
  Outcome,
  Process,
  differing,
)
from tests.faults.table import KILLED
from tests.store import BUCKET, Store
from vera_jax import results

COMMANDS = 3  # times that a run is tried in a bad store
MOST = 60  # changes of the store until a kill: those of about two epochs
BAD = {
  "errors and lost answers": {"errors": 0.05, "lost": 0.05},
  "slow answers": {"slow": 0.5},
}
# A process that takes those that it can of many locks, and holds on to them.
CLAIM = """
import sys
from vera_jax.locks import locked
from vera_jax.places import place
count, step = map(int, sys.argv[2:])
paths = [place(f"{sys.argv[1]}/{i}") for i in range(0, count, step)]
sys.stdin.readline()
with locked(paths) as mine:
  print(*(path.name for path in mine), flush=True)
  sys.stdin.readline()
"""


def is_lock(name: str) -> bool:
  return name.endswith("/lock") or "/locks/" in name


def audit(
  changes: Iterable[Mapping[str, Any]], ended: Mapping[int, float]
) -> list[str]:
  """The locks that were taken from a process that had not ended.

  Args:
    changes: all of the store's.
    ended: when processes ended, by their numbers; the others had not.
  """
  held: dict[str, dict[str, Any]] = {}
  stolen = []
  for change in changes:
    name = change["name"]
    if not is_lock(name):
      continue
    before, now = held.get(name), {}
    if change["after"]:
      now = json.loads(change["text"])
    if before and now and before["id"] != now["id"]:
      if ended.get(before["pid"], math.inf) > change["time"]:
        stolen.append(f"{name}: {before} lost it to {now}")
    held[name] = now
  return stolen


def owners(changes: Iterable[Mapping[str, Any]]) -> set[int]:
  """The processes that have had a lock."""
  return {
    json.loads(change["text"])["pid"]
    for change in changes
    if change["after"] and is_lock(change["name"])
  }


def fetch(store: Store, name: str, folder: Path) -> Path:
  """A folder of the store, copied to a local one."""
  objects = f"{store.address}/storage/v1/b/{BUCKET}/o"
  with urllib.request.urlopen(f"{objects}?prefix={name}/") as answer:
    names = [fields["name"] for fields in json.load(answer)["items"]]
  for each in names:
    (folder / each).parent.mkdir(parents=True, exist_ok=True)
    quoted = urllib.parse.quote(each, safe="")
    with urllib.request.urlopen(f"{objects}/{quoted}?alt=media") as answer:
      (folder / each).write_bytes(answer.read())
  return folder / name


def wait_for_changes(store: Store, count: int, process: Process) -> bool:
  """Whether there were so many more before the process ended."""
  before = len(store.changes())
  while process.poll() is None:
    if len(store.changes(before)) >= count:
      return True
    time.sleep(0.05)
  return False


def kills(
  launcher: Launcher, alone: Path, store: Store, *, times: int, seed: int = 0
) -> Outcome:
  """SIGKILL after random numbers of writes to the store."""
  rng, ended = random.Random(seed), dict[int, float]()
  environment = store.environment
  workdir, start = f"gs://{BUCKET}/killed", len(store.changes())
  while len(ended) < times:
    process = launcher.start(workdir, environment=environment)
    if not wait_for_changes(store, rng.randint(1, MOST), process):
      break  # the run has ended
    process.kill_now()
    ended[process.pid] = time.time()
  done = launcher.run(workdir, environment=environment)
  stolen = audit(store.changes(start), ended)
  copy = fetch(store, "killed", launcher.folder / "copies")
  same = done.code == 0 and not differing(copy, alone)
  seen = f"{len(store.changes(start))} writes; {len(stolen)} locks held by two"
  lost = int(not same) + len(stolen)
  return Outcome("in a store: kill -9 in one run", len(ended), lost, same, seen)


def bad_store(
  launcher: Launcher, alone: Path, store: Store, name: str
) -> Outcome:
  """A whole run in a store that fails in one way all the time.

  The same command is given again where it ends with an error.
  """
  modes, start = BAD[name], len(store.changes())
  run, ended, code = name.replace(" ", "-"), dict[int, float](), 1
  with store.modes(**modes):
    while code and len(ended) < COMMANDS:
      process = launcher.start(
        f"gs://{BUCKET}/{run}", environment=store.environment
      )
      code = process.end().code
      ended[process.pid] = time.time()
  copy = fetch(store, run, launcher.folder / "copies")
  same = code == 0 and not differing(copy, alone)
  stolen = audit(store.changes(start), ended)
  shown = ", ".join(f"{mode} {value:g}" for mode, value in modes.items())
  times = "once" if len(ended) == 1 else f"{len(ended)} times"
  seen, lost = f"{shown}; the command was given {times}", len(stolen)
  return Outcome(f"in a store: {name}", 1, lost + (not same), same, seen)


def claimants(store: Store, *, locks: int) -> Outcome:
  """Eight processes want the same locks at once; half are a dead one's."""

  def start(step: int) -> Any:
    folder = f"gs://{BUCKET}/claimed/locks"
    return subprocess.Popen(
      [sys.executable, "-c", CLAIM, folder, str(locks), str(step)],
      cwd=ROOT,
      env={**os.environ, **store.environment},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def tell(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()

  before = len(store.changes())
  dead, living = start(2), [start(1) for _ in range(8)]
  tell(dead)
  dead.stdout.readline()
  dead.kill()
  dead.communicate()
  ended = {dead.pid: time.time()}
  with store.modes(errors=0.01, lost=0.02):
    for process in living:
      tell(process)
    got = [process.stdout.readline().split() for process in living]
  for process in living:
    process.communicate("\n")
  winners = Counter(name for names in got for name in names)
  lost = sum(winners[str(i)] != 1 for i in range(locks))
  lost += len(audit(store.changes(before), ended))
  fault = "in a store: eight processes want the same locks"
  seen = f"{locks} locks, half of them a dead process's: one owner each"
  return Outcome(fault, 1, lost, None, f"{seen}; 2 % of answers were lost")


def sweep_kills(
  launcher: Launcher,
  store: Store,
  *,
  times: int,
  seed: int = 0,
  seeds: int = 4,
) -> Outcome:
  """SIGKILL to a sweep of two methods' runs and to its workers."""
  options: dict[str, Any] = {"sweep": f"tests/faults/sweep.py:{seeds}"}
  members = f"--members={seeds}"
  alone, start = launcher.folder / "untouched", len(store.changes())
  launcher.run(alone, members, **options)
  options["environment"] = store.environment
  rng, ended, killed, hit = random.Random(seed), dict[int, float](), 0, 0
  workdir = f"gs://{BUCKET}/sweep"
  while killed < times:
    before = len(store.changes())
    process = launcher.start(workdir, members, **options)
    # all members write at once, and some before they train
    if not wait_for_changes(store, rng.randint(1, seeds * MOST), process):
      break  # the sweep has ended
    kill_tree(process.pid)
    process.wait()
    killed += 1
    now, changes = time.time(), store.changes(before)
    ended |= dict.fromkeys(owners(changes), now)
    hit += any(change["name"].endswith(results.METRICS) for change in changes)
  done = launcher.run(workdir, members, **options)
  stolen = audit(store.changes(start), ended)
  copy = fetch(store, "sweep", launcher.folder / "copies")
  bad = unequal(copy, alone)
  seen = (
    f"{hit} of them while runs trained; {len(ended)} workers killed, too;"
    f" {len(stolen)} locks held by two"
  )
  lost = len(bad) + len(stolen) + done.code
  fault = "in a store: kill -9 to a sweep"
  return Outcome(fault, killed, lost, not bad, seen, "sweep", KILLED)
