"""Sweeps by an engine that loses machines: all done, as if it had lost none."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from tests.faults.fixtures import (
  Ended,
  Launcher,
  Outcome,
  Process,
  differing,
  wait_until,
)
from tests.faults.table import KILLED
from vera_jax.errors import UserError


def done(workdir: Path) -> int:
  return len(list(workdir.glob("runs/*/result.json")))


def wait_for(workdir: Path, count: int, process: Process) -> None:
  """Until so many runs are done, and another one trains."""
  wait_until(
    lambda: done(workdir) >= count and any(workdir.glob("locks/*")),
    process,
    every=0.2,
  )


def unequal(workdir: Path, untouched: Path) -> list[str]:
  """The runs that are not there, or are not those of the other sweep."""
  runs = [path.parent.name for path in untouched.glob("runs/*/result.json")]
  return [
    name
    for name in runs
    if not (workdir / "runs" / name / "result.json").exists()
    or differing(workdir / "runs" / name, untouched / "runs" / name)
  ]


@contextmanager
def watched(workdir: Path) -> Iterator[list[str]]:
  """The runs that two processes trained at once, by the files they had open."""
  twice: list[str] = []
  ended = threading.Event()

  def look() -> None:
    while not ended.wait(0.2):
      trained: Counter[str] = Counter()
      for process in Path("/proc").glob("[0-9]*/fd"):
        files = set()
        with suppress(OSError):  # it has ended
          files = {os.readlink(file) for file in process.iterdir()}
        trained.update(
          file
          for file in files
          if file.startswith(str(workdir)) and file.endswith("metrics.jsonl")
        )
      twice.extend(file for file, count in trained.items() if count > 1)

  thread = threading.Thread(target=look, daemon=True)
  thread.start()
  try:
    yield twice
  finally:
    ended.set()
    thread.join()


def kill_tree(pid: int) -> None:
  """A machine's processes, all at once."""
  with suppress(psutil.NoSuchProcess):
    process = psutil.Process(pid)
    for one in [process, *process.children(recursive=True)]:
      with suppress(psutil.NoSuchProcess):
        one.kill()


def run_alone(launcher: Launcher, sweep: str, *, members: int) -> Path:
  """The sweep that nothing happens to; so many of its runs train together."""
  workdir = launcher.folder / f"untouched-{members}"
  ended = launcher.run(workdir, f"--members={members}", sweep=sweep)
  if ended.code:
    raise UserError(f"The sweep left alone failed:\n{ended.output}")
  return workdir


@contextmanager
def cluster(
  launcher: Launcher, *, nodes: int
) -> Iterator[tuple[Any, list[Any]]]:
  """Ray's, and its nodes of one CPU each, all of them on this machine."""
  import ray.cluster_utils

  for tries_left in reversed(range(5)):
    simulated = ray.cluster_utils.Cluster()
    try:
      with patch.dict(os.environ, launcher.environment()):
        simulated.add_node(num_cpus=0)
        added = [simulated.add_node(num_cpus=1) for _ in range(nodes)]
      break
    except Exception:  # on a busy machine a node comes later than Ray waits
      simulated.shutdown()
      if not tries_left:
        raise
  try:
    yield simulated, added
  finally:
    simulated.shutdown()


def by_ray(
  launcher: Launcher,
  *,
  times: int,
  sweep: str,
  members: int = 3,
  seed: int = 0,
) -> Outcome:
  """Of three nodes, two are lost on the way."""

  def lose_nodes(workdir: Path, rng: random.Random) -> Ended:
    with cluster(launcher, nodes=3) as (simulated, nodes):
      options = f"--launcher_options=address={simulated.address}"
      process = launcher.start(
        workdir, f"--members={members}", "--launcher=ray", options, sweep=sweep
      )
      for node in rng.sample(nodes, 2):
        wait_for(workdir, done(workdir) + rng.randint(0, 3), process)
        time.sleep(rng.uniform(0, 5))
        kill_tree(node.all_processes["raylet"][0].process.pid)
        simulated.remove_node(node, allow_graceful=False)
      return process.end()

  return try_faults(
    "Ray: 2 of 3 nodes lost in a sweep",
    "ray",
    2,
    lose_nodes,
    launcher,
    run_alone(launcher, sweep, members=members),
    times=times,
    seed=seed,
  )


def by_submitit(
  launcher: Launcher,
  *,
  times: int,
  sweep: str,
  members: int = 1,
  seed: int = 0,
) -> Outcome:
  """Of jobs that submitit starts here, two are lost and one is preempted."""

  def lose_jobs(workdir: Path, rng: random.Random) -> Ended:
    process = launcher.start(
      workdir,
      f"--members={members}",
      "--launcher=slurm",
      "--launcher_options=cluster=local",
      sweep=sweep,
    )
    for fault in ("lost", "preempted", "lost"):
      wait_for(workdir, 0, process)
      time.sleep(rng.uniform(0, 10))
      with suppress(psutil.NoSuchProcess, IndexError):  # all have ended
        children = psutil.Process(process.pid).children()
        job = rng.choice([job for job in children if job.children()])
        if fault == "lost":
          kill_tree(job.pid)
        else:
          job.children()[0].send_signal(signal.SIGUSR2)
    return process.end()

  return try_faults(
    "submitit: 2 jobs lost, 1 preempted in a sweep",
    "submitit",
    3,
    lose_jobs,
    launcher,
    run_alone(launcher, sweep, members=members),
    times=times,
    seed=seed,
  )


def try_faults(
  fault: str,
  program: str,
  faults: int,
  harm: Callable[[Path, random.Random], Ended],
  launcher: Launcher,
  untouched: Path,
  *,
  times: int,
  seed: int,
) -> Outcome:
  """Sweeps that `harm` trains and disturbs, compared with the untouched one."""
  runs, failed, unlike, twice = done(untouched), 0, 0, 0
  for number in range(times):
    workdir = launcher.folder / f"{harm.__name__}-{number}"
    with watched(workdir) as both:
      failed += harm(workdir, random.Random(seed + number)).code != 0
    unlike += len(unequal(workdir, untouched))
    twice += len(set(both))
  return Outcome(
    fault,
    faults * times,
    failed + unlike + twice,
    not unlike,
    f"{times} sweeps of {runs} runs; {twice} runs were trained twice at once",
    *(program, KILLED),
  )
