"""A process that is lost, hangs or fails: the others end, and name it.

Three processes each, which compute next to nothing (`peer.py`); all cases run
at once. `python -m tests.faults.run --only=hosts` has whole runs of four.
"""

import os
import signal
import sys
import threading
import time
from typing import NamedTuple

import pytest

from tests.faults.fixtures import Process, free_port
from vera_jax.train import peers

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


class Case(NamedTuple):
  """What happens to which process; how the others end, and what they say."""

  victim: int
  mishap: str | signal.Signals
  code: int
  says: str
  file: str


CASES = {
  "killed": Case(1, signal.SIGKILL, 75, "is lost", "no sign of life"),
  "first killed": Case(0, signal.SIGKILL, 75, "is lost", "connections"),
  "stopped": Case(2, signal.SIGSTOP, 75, "is lost", "no sign of life"),
  "first stopped": Case(0, signal.SIGSTOP, 75, "is lost", "no answer"),
  "reads": Case(1, "read", 75, "hangs", "it has waited for its data"),
  "mistake": Case(2, "mistake", 1, "stopped: A mistake of the user", "A mis"),
  "crash": Case(2, "crash", 1, "stopped: A mistake of ours", "Traceback"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """The exit code and the output of each process, by case."""
  folder, started = tmp_path_factory.mktemp("peers"), {}
  for name, case in CASES.items():
    (folder / name / "another run").mkdir(parents=True)
    port = free_port()
    for number in range(3):
      command = [sys.executable, "-m", "tests.train.peer"]
      command += [f"localhost:{port}", "3", str(number), str(folder / name)]
      if number == case.victim and isinstance(case.mishap, str):
        command.append(case.mishap)
      started[name, number] = Process(
        command, output=folder / f"{name}-{number}", env=ENVIRONMENT
      )
  for name, case in CASES.items():
    if isinstance(case.mishap, signal.Signals):
      process = started[name, case.victim]
      while "step 4" not in process.output.read_text():
        assert process.poll() is None, process.output.read_text()
        time.sleep(0.2)
      process.send_signal(case.mishap)
  outcomes = {}
  for (name, number), process in started.items():
    case = CASES[name]
    is_victim = number == case.victim
    if not is_victim or isinstance(case.mishap, str):
      outcomes[name, number] = process.end()
  for process in started.values():
    process.kill_now()
  return folder, outcomes


@pytest.mark.parametrize("name", CASES)
def test_the_others_end_and_name_it(name, ended):
  folder, outcomes = ended
  case = CASES[name]
  named = f"Process {case.victim} ("
  for number in {0, 1, 2} - {case.victim}:
    outcome = outcomes[name, number]
    assert outcome.code == case.code, outcome.output
    lines = outcome.output.splitlines()
    assert any(named in line and case.says in line for line in lines), lines
  if (name, case.victim) in outcomes:
    assert outcomes[name, case.victim].code == case.code
  # what fails in the others, for the lack of one, is no error to be shown
  shown = {n for n in range(3) if "Traceback" in printed(outcomes, name, n)}
  assert case.victim in shown if case.mishap == "crash" else not shown
  for run in (folder / name, folder / name / "another run"):
    file = run / peers.ERRORS / f"host{case.victim}.txt"
    assert case.file in file.read_text()


def printed(outcomes, name, number):
  return outcomes[name, number].output if (name, number) in outcomes else ""


def test_the_first_process_ends_though_its_coordinator_does_not_answer(
  monkeypatch,
):
  monkeypatch.setattr(peers, "PAUSE", 0.1)
  first = object.__new__(peers.Peers)  # no coordinator, no thread
  first.folders, first._records, first._number = (), {}, 0
  first._changed = dict.fromkeys(range(3), time.monotonic())
  monkeypatch.setattr(first, "_exchange", threading.Event().wait)
  began = time.monotonic()
  first._outlast()
  assert time.monotonic() - began < peers.LOST / 2


@pytest.mark.parametrize("because, shown", [("", False), (2, True), (1, False)])
def test_a_traceback_is_shown_where_no_other_process_is_the_cause(
  because, shown, monkeypatch, capsys
):
  """Process 0 has ended before: by itself, or because of 2 or of 1."""
  crashed = object.__new__(peers.Peers)  # no coordinator, no thread
  record = {"code": 1, "host": "here", "text": "", "because": "", "sure": False}
  record |= {"batch": 0, "waits": 0.0}
  said = f"Process {because} (here) stopped" if because else ""
  first = record | {"because": said, "sure": True}
  crashed._number, crashed._records = 2, {0: first, 2: record}
  crashed._changed = dict.fromkeys((0, 2), time.monotonic())
  crashed._noticed, crashed._ending = -peers.LOST, threading.Lock()
  crashed.hold(ZeroDivisionError("A mistake of ours."))
  monkeypatch.setattr(crashed, "_end", lambda reasons, code: None)
  crashed._judge()
  assert ("A mistake of ours" in capsys.readouterr().err) == shown
