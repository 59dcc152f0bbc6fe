"""Start a worker for each unit of a sweep, one after another."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from vera_jax.errors import UserError
from vera_jax.sweep.plan import FAILED, NEW, UNFINISHED, Unit
from vera_jax.sweep.worker import note_failure
from vera_jax.train.preemption import EXIT_CODE, Flag, Interrupted, watch

WORKER = [sys.executable, "-m", "vera_jax.sweep.worker"]
POLL = 0.5  # seconds between looks at the worker
GRACE = 60.0  # seconds that a worker has for its last save
SAME = 3  # units that fail for one reason from the start: so would the rest


def run_units(
  units: Sequence[Unit],
  *,
  logs: Path,
  retry_failed: bool = False,
  on_start: Callable[[Unit], None] = lambda unit: None,
  on_end: Callable[[Unit], None] = lambda unit: None,
) -> None:
  """Train what is not done yet, unit by unit.

  Runs that another process is training are left to it. A run that fails leaves
  the others alone.

  Args:
    units: as `make_units` makes them.
    logs: a folder for what the workers print.
    retry_failed: whether failed runs are tried again.
    on_start, on_end: called with the runs of each worker.

  Raises:
    Interrupted: after Ctrl-C or SIGTERM, once the running unit is saved.
    UserError: the first units failed without a step and for the same reason,
      or the reason of one can't be written down.
  """
  wanted = (NEW, UNFINISHED, FAILED) if retry_failed else (NEW, UNFINISHED)
  reasons: list[str] = []
  with watch() as flag:
    for unit in units:
      left = [run for run in unit if run.state in wanted]
      if not left:
        continue
      on_start(left)
      code = _run_worker(left, logs, retry_failed, flag)
      on_end(left)
      if flag.caught or code == EXIT_CODE:
        name = flag.caught.name if flag.caught else "a signal"
        how = "all runs saved. The same command goes on."
        if code not in (0, EXIT_CODE):
          how = (
            "but the worker ended before it had saved. The same command goes on"
            " from the last saves, and with --retry_failed also with runs that"
            " failed."
          )
        raise Interrupted(f"Stopped by {name}, {how}")
      if code == 1 and any(run.state in (NEW, UNFINISHED) for run in left):
        raise UserError(
          f"{left[0].name} ended without a result, and why could not be written"
          f" into its folder: is the disk full? What it printed is in {logs}."
          " The same command goes on."
        )
      failures = {run.failure() for run in left if run.state == FAILED}
      same = code == 1 and len(failures) == 1
      reasons.append(failures.pop() if same else "")
      if len(reasons) == SAME and reasons[0] and len(set(reasons)) == 1:
        raise UserError(
          f"The first {SAME} units failed alike: {reasons[0]}\nMend that and"
          " give the same command with --retry_failed."
        )


def _run_worker(unit: Unit, logs: Path, retry_failed: bool, flag: Flag) -> int:
  """Train a unit in a process of its own; returns its exit code."""
  runs = [
    {
      # as JSON reads it back, for `note_failure` writes it too
      "config": json.loads(json.dumps(run.config.to_dict())),
      "folder": str(run.folder),
      "lock": str(run.lock),
    }
    for run in unit
  ]
  logs.mkdir(parents=True, exist_ok=True)
  log = logs / f"{unit[0].name}.log"
  with log.open("a", encoding="utf-8") as file:
    worker = subprocess.Popen(
      WORKER,
      stdin=subprocess.PIPE,
      stdout=file,
      stderr=file,
      start_new_session=True,  # Ctrl-C reaches us alone; we pass it on
    )
  stdin = worker.stdin
  assert stdin is not None
  task = json.dumps({"runs": runs, "retry_failed": retry_failed})
  with suppress(BrokenPipeError):  # it ended at once; its exit code says how
    stdin.write(task.encode() + b"\n")
    stdin.flush()
  deadline = None
  while (code := worker.poll()) is None:
    with suppress(subprocess.TimeoutExpired):
      worker.wait(timeout=POLL)
    if flag.caught and deadline is None:
      stdin.close()  # which tells the worker to save and stop
      deadline = time.monotonic() + GRACE
    if deadline is not None and time.monotonic() > deadline:
      worker.kill()
  with suppress(BrokenPipeError):
    stdin.close()
  if code in (0, 1, EXIT_CODE) or flag.caught:
    return code
  how = f"The worker ended with exit code {code}."
  if code < 0:
    name = signal.Signals(-code).name
    memory = " (out of memory? try --members=1)" if name == "SIGKILL" else ""
    how = f"The worker was ended by {name}{memory}."
  lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
  last = "\n".join(lines[-5:])
  note_failure(runs, f"{how} The last lines of {log}:\n{last}")
  return 1
