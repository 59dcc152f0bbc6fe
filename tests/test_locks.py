"""One process at a time has a lock, on a disk and in a store."""

import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from vera_jax import locks
from vera_jax.errors import UserError
from vera_jax.locks import (
  await_owner,
  describe_owner,
  is_locked,
  is_mine,
  locked,
)
from vera_jax.places import is_remote, place


def acquire(path):
  """Take a lock without the context that renews it and gives it back."""
  return locks._acquire(locks._lock(path))


def read(path):
  return locks._lock(path).read()


def put(path, text):
  """What another process writes."""
  if not is_remote(path):
    path.write_text(text)
    return
  lock = locks._lock(path)
  for _ in range(20):  # its owner may renew it between these two
    lock.read()
    if lock.write(text):
      return
  raise AssertionError(f"{path} can't be written")


def leave(path, **owner):
  """A lock of a process that is gone, or of another machine."""
  record = json.loads(acquire(path))
  put(path, json.dumps({**record, **owner}))


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path):
  """Where the locks are."""
  if request.param == "disk":
    return tmp_path
  bucket = request.getfixturevalue("bucket")
  return place(f"{bucket}/{uuid.uuid4().hex}")


@pytest.fixture
def grow_old(request):
  """Makes a lock one that was not renewed for long."""
  with ExitStack() as stack:

    def grow_old(path, seconds=2 * locks.STALE):
      if is_remote(path):
        store = request.getfixturevalue("store")
        stack.enter_context(store.modes(ahead=seconds))
      else:
        long_ago = time.time() - seconds
        os.utime(path, (long_ago, long_ago))

    yield grow_old


@pytest.fixture
def dead():
  """The number of a process that has ended."""
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def test_one_has_it_until_it_ends(folder):
  path = folder / "locks" / "run"
  assert not is_mine(path)
  with locked([path]) as mine:
    assert mine == [path] and is_locked(path) and is_mine(path)
    with locked([path, folder / "other"]) as others:
      assert others == [folder / "other"]
  assert not is_locked(path) and not path.exists()
  assert is_remote(path) or list(path.parent.iterdir()) == []


def test_many_at_once_and_one_gets_it(folder, dead):
  for number in range(20):
    path = folder / str(number)
    if number % 2:
      leave(path, pid=dead)
    with ThreadPoolExecutor(8) as pool:
      got = list(pool.map(lambda _, p=path: acquire(p), range(8)))
    (record,) = [record for record in got if record]
    assert read(path) == record


def test_a_dead_process_has_nothing(folder, dead):
  path = folder / "run"
  leave(path, pid=dead)
  assert not is_locked(path) and acquire(path) and is_locked(path)


def test_a_later_process_of_the_same_number_is_another(folder):
  leave(folder / "run", started="1")
  assert not is_locked(folder / "run")
  assert not is_mine(folder / "run")


def test_another_machine_is_believed_while_it_renews(folder, grow_old):
  path = folder / "run"
  leave(path, host="elsewhere", pid=1)
  assert is_locked(path) and not acquire(path)
  assert describe_owner(path) == "process 1 on elsewhere"
  grow_old(path)
  assert not is_locked(path) and acquire(path)


def test_a_clock_that_was_set_back_keeps_no_dead_machines_lock(tmp_path):
  path, now = tmp_path / "run", time.time()
  leave(path, host="elsewhere", pid=1)
  for ahead, counts in ((60, True), (86_400, False)):
    os.utime(path, (now + ahead, now + ahead))
    assert is_locked(path) is counts


def test_a_lost_machines_lock_is_waited_for(folder, grow_old, monkeypatch):
  """Until it is stale; a living owner's only until it is renewed."""
  dead, living = folder / "dead", folder / "living"
  for path in (dead, living):
    leave(path, host="elsewhere")
    grow_old(path, 60)
  lock, waited = locks._lock(living), []

  def renew(seconds):
    waited.append(seconds)
    lock.renew(lock.read())

  monkeypatch.setattr(locks.time, "sleep", renew)
  await_owner(living)
  assert len(waited) == 1 and is_locked(living)
  monkeypatch.setattr(locks.time, "sleep", lambda _: grow_old(dead))
  await_owner(dead)
  assert not is_locked(dead)


def test_it_is_renewed(folder, grow_old, monkeypatch):
  monkeypatch.setattr(locks, "BEAT", 0.1)
  monkeypatch.setattr(locks, "_host", lambda: "elsewhere")
  with locked([folder / "run"]) as (path,):
    grow_old(path)
    monkeypatch.setattr(locks, "_host", lambda: "here")
    deadline = time.monotonic() + 20
    while not is_locked(path):
      assert time.monotonic() < deadline
      time.sleep(0.1)


def test_who_was_away_for_long_leaves_anothers_lock_alone(
  folder, grow_old, monkeypatch
):
  monkeypatch.setattr(locks, "BEAT", 0.01)
  path = folder / "run"
  with locked([path]):
    leave(folder / "other", host="elsewhere")
    other = read(folder / "other")
    put(path, other)
    grow_old(path)
    time.sleep(0.2)
    assert not is_mine(path)
    assert not is_locked(path)  # it did not renew the other's
  assert read(path) == other


@pytest.mark.parametrize("text", ["", "process 1 on node3", '{"host": "no'])
def test_a_lock_without_a_whole_record_counts_while_it_is_young(
  text, folder, grow_old
):
  path = folder / "run"
  put(path, text)
  assert is_locked(path) and not acquire(path)
  assert "no name" in describe_owner(path)
  grow_old(path)
  assert acquire(path) and is_locked(path)
  assert [file.name for file in folder.iterdir()] == ["run"]


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


def test_an_answer_that_was_lost_is_no_lock_that_was_lost(bucket, store):
  """The client asks again, and its own write is in the way."""
  path = place(f"{bucket}/{uuid.uuid4().hex}")
  lock, record = locks._lock(path), json.dumps({**locks._me(), "id": "a"})
  lock.read()
  with ThreadPoolExecutor() as pool:
    with store.modes(lost=1):
      taken = pool.submit(lock.write, record)
      while not [x for x in store.changes() if x["name"] == path.name]:
        time.sleep(0.01)
    assert taken.result() and record == read(path)
    lock.read()
    with store.modes(lost=1):
      renewal = pool.submit(lock.renew, record)
      while len([x for x in store.changes() if x["name"] == path.name]) < 2:
        time.sleep(0.01)
    assert renewal.result() and is_mine(path)


def test_a_store_that_is_away_is_an_error(bucket, store, monkeypatch):
  path = place(f"{bucket}/{uuid.uuid4().hex}")
  monkeypatch.setattr(locks, "ANSWER", 1)
  with locked([path]):
    with store.modes(errors=1), pytest.raises(OSError, match="can't be asked"):
      is_locked(path)
