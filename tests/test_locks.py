"""One process at a time has a lock."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vera_jax import locks
from vera_jax.errors import UserError
from vera_jax.locks import describe_owner, is_locked, locked

acquire = locks._acquire  # without the context that gives it back


def leave(path, **owner):
  """A lock of a process that is gone, or of another machine."""
  record = json.loads(acquire(path))
  path.write_text(json.dumps({**record, **owner}))


@pytest.fixture
def dead():
  """The number of a process that has ended."""
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def test_one_has_it_until_it_ends(tmp_path):
  path = tmp_path / "locks" / "run"
  with locked([path]) as mine:
    assert mine == [path] and is_locked(path)
    with locked([path, tmp_path / "other"]) as others:
      assert others == [tmp_path / "other"]
  assert not is_locked(path) and not path.exists()
  assert list(path.parent.iterdir()) == []


def test_many_at_once_and_one_gets_it(tmp_path, dead):
  for number in range(20):
    path = tmp_path / str(number)
    if number % 2:
      leave(path, pid=dead)
    with ThreadPoolExecutor(8) as pool:
      got = list(pool.map(lambda _, p=path: acquire(p), range(8)))
    assert len([record for record in got if record]) == 1


def test_a_dead_process_has_nothing(tmp_path, dead):
  path = tmp_path / "run"
  leave(path, pid=dead)
  assert not is_locked(path) and acquire(path) and is_locked(path)


def test_a_later_process_of_the_same_number_is_another(tmp_path):
  leave(tmp_path / "run", started="1")
  assert not is_locked(tmp_path / "run")


def test_another_machine_is_believed_while_it_touches(tmp_path, monkeypatch):
  path = tmp_path / "run"
  leave(path, host="elsewhere", pid=1)
  assert is_locked(path) and not acquire(path)
  assert describe_owner(path) == "process 1 on elsewhere"
  long_ago = time.time() - 2 * locks.STALE
  os.utime(path, (long_ago, long_ago))
  assert not is_locked(path) and acquire(path)
  monkeypatch.setattr(locks, "BEAT", 0.1)
  with locked([tmp_path / "mine"]) as mine:
    os.utime(mine[0], (long_ago, long_ago))
    deadline = time.monotonic() + 20
    while mine[0].stat().st_mtime < long_ago + 1:
      assert time.monotonic() < deadline
      time.sleep(0.1)


def test_who_was_away_for_long_leaves_anothers_lock_alone(tmp_path):
  path = tmp_path / "run"
  with locked([path]):
    path.unlink()
    other = acquire(path)
  assert path.read_text() == other


@pytest.mark.parametrize("text", ["", "process 1 on node3", '{"host": "no'])
def test_a_lock_without_a_whole_record_counts_while_it_is_young(text, tmp_path):
  path = tmp_path / "run"
  path.write_text(text)
  assert is_locked(path) and not acquire(path)
  assert "no name" in describe_owner(path)
  long_ago = time.time() - 2 * locks.STALE
  os.utime(path, (long_ago, long_ago))
  assert acquire(path) and is_locked(path)
  assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
  "change",
  [{"pid": "1"}, {"pid": -1}, {"pid": 2**63}, {"host": " "}, {"id": "../x"}],
)
def test_a_record_that_no_owner_wrote_names_nobody(change, tmp_path):
  path = tmp_path / "lock"
  with locked([path]):
    record = json.loads(path.read_text())
  path.write_text(json.dumps(record | change))
  assert is_locked(path)  # until it is old
  assert describe_owner(path) == "a process that gave no name"


def test_what_is_no_file_is_no_lock(tmp_path):
  os.mkfifo(tmp_path / "lock")
  with pytest.raises(UserError, match="a pipe"):
    is_locked(tmp_path / "lock")
