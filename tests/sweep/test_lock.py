"""One process at a time has a run."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vera_jax.sweep import lock
from vera_jax.sweep.lock import acquire, held, is_held


def leave(path, **owner):
  """A lock of a process that is gone, or of another machine."""
  acquire(path)
  told = {**json.loads(path.read_text()), **owner}
  path.write_text(json.dumps(told))


@pytest.fixture
def dead():
  """The number of a process that has ended."""
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def test_one_has_it_until_it_ends(tmp_path):
  path = tmp_path / "locks" / "run"
  with held([path]) as mine:
    assert mine == [path] and is_held(path)
    with held([path, tmp_path / "other"]) as others:
      assert others == [tmp_path / "other"]
  assert not is_held(path) and not path.exists()
  assert list(path.parent.iterdir()) == []


def test_many_at_once_and_one_gets_it(tmp_path, dead):
  for number in range(20):
    path = tmp_path / str(number)
    if number % 2:
      leave(path, pid=dead)
    with ThreadPoolExecutor(8) as pool:
      got = list(pool.map(lambda _, p=path: acquire(p), range(8)))
    assert sum(got) == 1


def test_a_dead_process_has_nothing(tmp_path, dead):
  path = tmp_path / "run"
  leave(path, pid=dead)
  assert not is_held(path) and acquire(path) and is_held(path)


def test_a_later_process_of_the_same_number_is_another(tmp_path):
  leave(tmp_path / "run", started="1")
  assert not is_held(tmp_path / "run")


def test_another_machine_is_believed_while_it_touches(tmp_path, monkeypatch):
  path = tmp_path / "run"
  leave(path, host="elsewhere", pid=1)
  assert is_held(path) and not acquire(path)
  long_ago = time.time() - 2 * lock.STALE
  os.utime(path, (long_ago, long_ago))
  assert not is_held(path) and acquire(path)
  monkeypatch.setattr(lock, "BEAT", 0.0)
  with held([tmp_path / "mine"]) as mine:
    os.utime(mine[0], (long_ago, long_ago))
    deadline = time.monotonic() + 20
    while mine[0].stat().st_mtime < long_ago + 1:
      assert time.monotonic() < deadline
      time.sleep(0.1)
