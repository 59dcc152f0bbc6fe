"""Four processes of one run, on one folder: one of them, or all, in trouble."""

import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.faults.everyday import (
  DAY,
  SECONDS,
  is_sentence,
  movable_clock,
  set_clock,
  short,
  with_other_texts,
)
from tests.faults.fixtures import (
  NO_DISK,
  Ended,
  Launcher,
  Outcome,
  Process,
  fill,
  free_port,
  reach,
  saves,
  small_disk,
  wait_until,
)
from tests.faults.interruption import EPOCH, is_saving
from tests.faults.processes import CLOSE, largest_difference
from tests.faults.table import (
  CHANGED,
  CLOCK,
  HARMED,
  ONE,
  REMOVED,
  RESIZED,
  SAVING,
  SLEPT,
  TWICE,
)

FOUR: dict[str, Any] = {"count": 4, "devices": 1}
AWAKE, SLOW = 0.02, 10.0  # seconds of a slowed process; how much slower it is


class Four:
  """Starts runs of four processes, and compares them with one left alone."""

  def __init__(self, launcher: Launcher) -> None:
    self.launcher, self.alone = launcher, launcher.folder / "alone"
    ended = launcher.run_several(self.alone, **FOUR)
    assert not any(end.code for end in ended), ended[0].output

  def begun(self, name: str, **options: Any) -> tuple[Path, list[Process]]:
    """A run that is in its second epoch."""
    workdir = self.launcher.folder / name
    processes = self.launcher.start_several(workdir, **FOUR, **options)
    reach(workdir, EPOCH + 3, processes[0])
    return workdir, processes

  def again(self, workdir: Path) -> bool:
    """Whether the same command ends as if nothing had happened."""
    ended = self.launcher.run_several(workdir, **FOUR)
    good = not any(end.code for end in ended)
    if not good:
      print(ended[0].output[-3000:])
    return good and not self.launcher.differing(workdir, self.alone)


def outcome(kind: str, fault: str, good: bool, seen: str) -> Outcome:
  fault = f"four processes: {fault}"
  return Outcome(fault, 1, int(not good), good, seen, "four", kind)


def ends(processes: Sequence[Process]) -> tuple[list[Ended], float]:
  """How they end by themselves, and after how many seconds all have."""
  began = time.monotonic()
  ended = [process.end() for process in processes]
  return ended, time.monotonic() - began


def others_end(
  four: Four, name: str, trouble: Callable[[Process], object], victim: int
) -> tuple[bool, float, list[Ended], Path]:
  """One gets into trouble: whether the others name it, and end with 75.

  Returns:
    That, after how many seconds, how they ended, the folder.
  """
  workdir, processes = four.begun(name)
  trouble(processes[victim])
  rest = [p for p in processes if p is not processes[victim]]
  ended, seconds = ends(rest)
  named = all(f"Process {victim} (" in end.output for end in ended)
  good = named and all(end.code == 75 for end in ended)
  if not good:
    print(*(end.output[-1500:] for end in ended), sep="\n---\n")
  processes[victim].send_signal(signal.SIGCONT)
  processes[victim].end()
  return good and seconds < SECONDS, seconds, ended, workdir


def asleep(four: Four) -> Iterator[Outcome]:
  """One is stopped until the others have ended; then it wakes."""
  for victim in (0, 2):
    good, seconds, _, workdir = others_end(
      four, f"asleep-{victim}", lambda x: x.send_signal(signal.SIGSTOP), victim
    )
    yield outcome(
      SLEPT,
      f"process {victim} asleep",
      good and four.again(workdir),
      f"the others name it and end with 75 within {seconds:.0f} s; it ends when"
      " it wakes; the same command goes on",
    )


def slowed(four: Four) -> Outcome:
  """One runs for a tenth of the time."""
  workdir, processes = four.begun("slowed")

  def slow() -> None:
    while processes[2].poll() is None:
      for number, part in ((signal.SIGCONT, 1.0), (signal.SIGSTOP, SLOW - 1)):
        with suppress(ProcessLookupError):
          processes[2].send_signal(number)
        time.sleep(part * AWAKE)

  threading.Thread(target=slow, daemon=True).start()
  ended, _ = ends(processes)
  same = not any(end.code for end in ended)
  same = same and not four.launcher.differing(workdir, four.alone)
  return outcome(ONE, "one slowed to a tenth", same, "all wait for it")


def no_memory(four: Four) -> Outcome:
  """One can have no more memory than it has."""

  def starve(process: Process) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_AS, (2**20, 2**20))

  good, seconds, _, workdir = others_end(four, "memory", starve, 2)
  return outcome(
    ONE,
    "one out of memory",
    good and four.again(workdir),
    f"the others name it and end with 75 within {seconds:.0f} s; the same"
    " command goes on",
  )


def full_disk(four: Four) -> Outcome:
  """Their folder is on a disk that fills up in the second epoch."""
  with small_disk(four.launcher.folder, megabytes=4) as disk:
    if disk is None:
      return Outcome("four processes: full disk", 0, 0, None, NO_DISK)
    workdir, processes = four.begun("disk/run")
    filler = fill(disk)
    ended, seconds = ends(processes)
    filler.unlink()
    good = all(is_sentence(end) and "disk" in end.output for end in ended)
    if not good:
      print(*(end.output[-1500:] for end in ended), sep="\n---\n")
    good = good and seconds < SECONDS and four.again(workdir)
  seen = f"all say so within {seconds:.0f} s; with space, the same command goes"
  return outcome(ONE, "out of disk", good, f"{seen} on")


@contextmanager
def relay(port: int) -> Iterator[tuple[int, Callable[[], None]]]:
  """(its own port, what cuts it) of a line to a port of this machine."""
  server = socket.create_server(("127.0.0.1", 0))
  lines: list[socket.socket] = [server]

  def pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
      while data := source.recv(2**16):
        target.sendall(data)

  def accept() -> None:
    with suppress(OSError):
      while True:
        near, _ = server.accept()
        try:
          far = socket.create_connection(("127.0.0.1", port))
        except OSError:  # nobody listens yet: it is asked again
          near.close()
          continue
        lines.extend((near, far))
        for pair in ((near, far), (far, near)):
          threading.Thread(target=pump, args=pair, daemon=True).start()

  def cut() -> None:
    for line in lines:
      with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
      line.close()

  threading.Thread(target=accept, daemon=True).start()
  try:
    yield server.getsockname()[1], cut
  finally:
    cut()


def cut_off(four: Four) -> Outcome:
  """One loses its connection to the coordinator."""
  port = free_port()
  with relay(port) as (near, cut):
    workdir, processes = four.begun("cut", port=port, ports={2: near})
    cut()
    ended, seconds = ends(processes)
  others = [end for number, end in enumerate(ended) if number != 2]
  named = all("Process 2 (" in end.output for end in others)
  good = named and all(end.code == 75 for end in ended) and seconds < SECONDS
  if not good:
    print([end.code for end in ended], seconds)
    print(*(end.output[-1500:] for end in ended), sep="\n---\n")
  return outcome(
    ONE,
    "one cut off from the coordinator",
    good and four.again(workdir),
    f"the others name it, and it process 0; all end with 75 within"
    f" {seconds:.0f} s; the same command goes on",
  )


def twice(four: Four) -> Outcome:
  """Four on the folder of one, which is stopped lest it has ended before."""
  workdir = four.launcher.folder / "twice"
  first = four.launcher.start(workdir)
  reach(workdir, 1, first)
  first.send_signal(signal.SIGSTOP)
  second = four.launcher.run_several(workdir, **FOUR)
  first.kill_now()
  owner = f"process {first.pid} on"
  good = all(is_sentence(end) and owner in end.output for end in second)
  if not good:
    print(*(end.output[-1500:] for end in second), sep="\n---\n")
  seen = "refused by all, with the first one's process and host"
  return outcome(TWICE, "on the folder of another run", good, seen)


def in_a_save(four: Four) -> Outcome:
  """SIGTERM to all in the middle of a save."""
  workdir, processes = four.begun("in-a-save")
  wait_until(lambda: is_saving(workdir), processes[0])
  for process in processes:
    process.send_signal(signal.SIGTERM)
  ended, _ = ends(processes)
  good = all(end.code == 75 for end in ended)
  step = saves(workdir)[-1]
  seen = f"all save at step {step}, exit code 75; the same command goes on"
  return outcome(
    SAVING, "SIGTERM in a save", good and four.again(workdir), seen
  )


def stopped(four: Four) -> Path:
  """A run that was stopped in its second epoch."""
  workdir = four.launcher.folder / "stopped"
  if not workdir.exists():
    _, processes = four.begun("stopped")
    processes[1].send_signal(signal.SIGTERM)
    ends(processes)
  return workdir


def copied(four: Four, name: str) -> Path:
  return shutil.copytree(stopped(four), four.launcher.folder / name)


def harmed(four: Four) -> Outcome:
  """A file of the newest save is cut."""
  workdir = copied(four, "harmed")
  before, newest = saves(workdir)[-2:]
  save = workdir / "checkpoints" / str(newest)
  file = max(save.rglob("*"), key=lambda path: path.stat().st_size)
  file.write_bytes(file.read_bytes()[:-2])
  good = four.again(workdir) and (workdir / "damaged" / str(newest)).is_dir()
  seen = f"the save is named and set aside; on from step {before}"
  return outcome(HARMED, "a harmed save", good, seen)


def changed(four: Four) -> Outcome:
  """A line of the data is another one."""
  workdir = copied(four, "changed")
  train = four.launcher.folder / "data/train.tsv"
  before = train.read_bytes()
  train.write_bytes(with_other_texts(before))
  ended = four.launcher.run_several(workdir, **FOUR)
  train.write_bytes(before)
  good = all(is_sentence(end) for end in ended)
  good &= all("data have changed" in end.output for end in ended)
  seen = "refused by all until the file was put back: the data have changed"
  return outcome(CHANGED, "changed data", good and four.again(workdir), seen)


def clock(four: Four) -> Iterator[Outcome]:
  """The clocks of all jump."""
  if not shutil.which("cc"):
    return
  with movable_clock(four.launcher.folder / "clock") as (jump, environment):
    for name, seconds in (("forward", DAY), ("back", -DAY)):
      set_clock(jump, 0)
      workdir, processes = four.begun(f"clock-{name}", environment=environment)
      set_clock(jump, seconds)
      ended, waited = ends(processes)
      seen, codes = "they go on", {end.code for end in ended}
      same = codes == {0}
      if codes == {75}:  # jax's coordinator gives all up, as peers.py says
        same = all("clock was set back" in end.output for end in ended)
        same = same and waited < SECONDS and four.again(workdir)
        seen = f"all end with 75 within {waited:.0f} s, and say so; the same"
        seen += " command goes on"
      same = same and not four.launcher.differing(workdir, four.alone)
      if not same:
        print(*(end.output[-1500:] for end in ended), sep="\n---\n")
      yield outcome(CLOCK, f"the clock jumps a day {name}", same, seen)


def removed(four: Four) -> Outcome:
  """Their saves."""
  workdir, processes = four.begun("removed")
  shutil.rmtree(workdir / "checkpoints")
  ended, seconds = ends(processes)
  good = all(end.code == 0 or is_sentence(end) for end in ended)
  good &= seconds < SECONDS
  if not good:
    print(*(end.output[-1500:] for end in ended), sep="\n---\n")
  seen = "they go on"
  if any(end.code for end in ended):
    line = ended[0].output.strip().splitlines()[-1]
    seen = f"{short(line, four.launcher.folder)} Then they went on"
  return outcome(REMOVED, "saves removed", good and four.again(workdir), seen)


def resized(four: Four) -> Outcome:
  """Stopped as four, gone on with as four, two and one."""
  lost, gaps = 0, []
  for count in (4, 2, 1):
    workdir = copied(four, f"by-{count}")
    ended = four.launcher.run_several(workdir, count=count, devices=1)
    lost += any(end.code for end in ended)
    gap = largest_difference(workdir, four.alone)
    lost += gap > CLOSE or (count == 4 and gap > 0)
    gaps.append(f"{gap:.1e} by {count}")
  return Outcome(
    "four processes: stopped, then four, two, one",
    3,
    lost,
    None,
    f"losses differ by {', '.join(gaps)}",
    *("four", RESIZED),
  )


def troubles(launcher: Launcher) -> Iterator[Outcome]:
  """All of these."""
  four = Four(launcher)
  yield twice(four)
  yield in_a_save(four)
  yield harmed(four)
  yield changed(four)
  yield resized(four)
  yield slowed(four)
  yield full_disk(four)
  yield cut_off(four)
  yield no_memory(four)
  yield removed(four)
  yield from clock(four)
  yield from asleep(four)
