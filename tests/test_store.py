"""The store that tests start keeps Cloud Storage's promises."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

gcsfs = pytest.importorskip("gcsfs")

from tests.store import BUCKET  # noqa: E402


def test_create_only_if_absent_has_one_winner(store, bucket):
  files = gcsfs.GCSFileSystem()

  def create(number):
    try:
      files.pipe_file(f"{BUCKET}/one", b"%d" % number, mode="create")
    except FileExistsError:
      return None
    return number

  with ThreadPoolExecutor(8) as pool:
    (winner,) = [x for x in pool.map(create, range(8)) if x is not None]
  assert files.cat_file(f"{BUCKET}/one") == b"%d" % winner
  with pytest.raises(FileExistsError):
    files.call("DELETE", "b/{}/o/{}", BUCKET, "one", ifGenerationMatch="1")
  number = files.info(f"{BUCKET}/one")["generation"]
  files.call("DELETE", "b/{}/o/{}", BUCKET, "one", ifGenerationMatch=number)
  assert not files.exists(f"{BUCKET}/one")
  noted = [x for x in store.changes() if x["name"] == "one"]
  assert [x["after"] for x in noted] == [int(number), 0]


def test_any_bytes_come_back(bucket):
  files = gcsfs.GCSFileSystem()
  for data in (b"\r\n\r", b"\n", b"", bytes(range(256)), bytes(2**23 + 1)):
    with files.open(f"{BUCKET}/bytes", "wb") as file:
      file.write(data)
    assert files.cat_file(f"{BUCKET}/bytes") == data


def test_modes(store, bucket):
  files = gcsfs.GCSFileSystem(use_listings_cache=False)
  files.pipe_file(f"{BUCKET}/modes/old", b"1")
  time.sleep(1)
  with store.modes(lag=1, slow=0.1):
    files.pipe_file(f"{BUCKET}/modes/new", b"1")
    assert files.ls(f"{BUCKET}/modes") == [f"{BUCKET}/modes/old"]
    assert files.cat_file(f"{BUCKET}/modes/new") == b"1"
  assert len(files.ls(f"{BUCKET}/modes")) == 2

  def writes():
    return [x["text"] for x in store.changes() if x["name"] == "modes/new"]

  with ThreadPoolExecutor() as pool:
    with store.modes(errors=1):
      write = pool.submit(files.pipe_file, f"{BUCKET}/modes/new", b"2")
      time.sleep(0.1)
      assert writes() == ["1"]
    write.result()  # asked again
    with store.modes(lost=1):
      write = pool.submit(files.pipe_file, f"{BUCKET}/modes/new", b"3")
      while len(writes()) < 3:
        time.sleep(0.01)
    write.result()
  assert writes() == ["1", "2", "3", "3"]
