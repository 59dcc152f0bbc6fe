"""Have a sweep's units trained by a launcher, until all runs are done."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from vera_jax.errors import UserError
from vera_jax.sweep.launchers.launcher import Launcher, Task
from vera_jax.sweep.plan import DONE, FAILED, NEW, RUNNING, UNFINISHED, Unit
from vera_jax.train.preemption import watch

STOPPING = (
  "Stopping: the workers save their runs and end; again to end now, losing what"
  " came after the last saves."
)
SAME = 3  # units that fail for one reason from the start: so would the rest
IDLE = 3  # times that all that is left is tried, and no run ends


def run_units(
  units: Sequence[Unit],
  launcher: Launcher,
  *,
  logs: Path,
  members: int | None = None,
  hosts: int = 1,
  retry_failed: bool = False,
  say: Callable[[str], None] = lambda line: None,
  on_end: Callable[[Unit], None] = lambda unit: None,
) -> None:
  """Train what is not done yet.

  A run that fails leaves the others alone. Where an engine is done with a unit
  whose runs are not (its job was lost, or their locks were still taken), they
  are given to it again.

  Args:
    units: as `make_units` makes them.
    launcher: starts the workers.
    logs: a folder for what they print.
    members: runs of a unit that train at once; None for all of them.
    hosts: processes that train one unit, each on a machine of its own.
    retry_failed: whether failed runs are tried again.
    say: takes lines that say what was started.
    on_end: called with the runs of each worker that has ended.

  Raises:
    Interrupted: after Ctrl-C or SIGTERM, as the launcher says.
    UserError: the first units failed without a step and for the same reason,
      or runs are left that no worker came to the end of.
  """
  wanted = {NEW, UNFINISHED, FAILED} if retry_failed else {NEW, UNFINISHED}
  reasons: list[str] = []
  idle, lost = 0, ""

  def ended() -> int:
    return sum(run.state in (DONE, FAILED) for unit in units for run in unit)

  def left() -> Iterator[Task]:
    for unit in units:
      if runs := [run for run in unit if run.state in wanted]:
        message = {
          "runs": [
            {
              # as JSON reads it back, for `note_failure` writes it too
              "config": json.loads(json.dumps(run.config.to_dict())),
              "folder": str(run.folder),
              "lock": str(run.lock),
            }
            for run in runs
          ],
          "log": str(logs / runs[0].name),
          "inputs": str(logs.parent / "inputs"),
          # of the whole unit: what is done leaves the others' program as it is
          "members": min(members or len(unit), len(unit)),
          "retry_failed": retry_failed,
          "patience": launcher.patience,
          "hosts": hosts,
        }
        yield Task(runs, message)

  with watch(STOPPING) as flag:
    while next(left(), None):
      if idle == IDLE:
        names = ", ".join(map(str, left()))
        raise UserError(
          f"{IDLE} times nothing came of {names}. What the workers printed is"
          f" in {logs}. The same command goes on.{lost}"
        )
      before = ended()
      with closing(launcher.run(left(), flag, say)) as outcomes:
        for unit, code, reason in outcomes:
          on_end(unit)
          lost = f"\n{reason}" if reason else lost
          failures = {run.failure() for run in unit if run.state == FAILED}
          same = code == 1 and len(failures) == 1
          reasons.append(failures.pop() if same else "")
          if len(reasons) == SAME and reasons[0] and len(set(reasons)) == 1:
            raise UserError(
              f"The first {SAME} units failed alike: {reasons[0]}\nMend that"
              " and give the same command with --retry_failed."
            )
      idle = 0 if ended() > before else idle + 1
      retry_failed, wanted = False, {NEW, UNFINISHED}  # once is enough
      if launcher.patience:
        # Nothing of ours runs any more: a lock that is still taken is another
        # process's, or of a machine that is lost, and then it will expire.
        wanted.add(RUNNING)
