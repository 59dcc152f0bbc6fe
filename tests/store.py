"""An object store on this machine: gcp-storage-emulator, with what it lacks.

The emulator ignores preconditions, doesn't tell a reader the generation, and
takes a body that broke off for a whole one. Here `ifGenerationMatch` holds for
writes and deletions, each write has a generation of its own, and each change is
noted. `Store.modes` makes the store fail, lose answers, be slow, or show
listings of a while ago.
"""

import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

BUCKET = "bucket"
# Else gcsfs asks another service what kind each bucket is, and none is here. It
# looks at this when it is imported, which may be before a store starts.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
CALM = {"errors": 0.0, "lost": 0.0, "slow": 0.0, "lag": 0.0, "ahead": 0.0}


class Store:
  """A running store; its environment is for processes that are to use it."""

  def __init__(self, address: str) -> None:
    self.address = address
    self.environment = {
      "STORAGE_EMULATOR_HOST": address,
      "TENSORSTORE_GCS_HTTP_URL": address,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # tensorstore asks no server
    }

  @contextmanager
  def modes(self, **modes: float) -> Iterator[None]:
    """Make it a bad store until this context ends.

    Args:
      modes: errors, the share of requests that are answered 503 or by a closed
        connection and not carried out; lost, that of those that are carried out
        first; slow, the most seconds until an answer; lag, how many seconds old
        a listing is; ahead, how far its clock is ahead of this machine's.
    """
    self._ask("modes", CALM | modes)
    try:
      yield
    finally:
      self._ask("modes", CALM)

  def changes(self, since: int = 0) -> list[dict[str, Any]]:
    """All writes and deletions so far, in order, but for the first `since`.

    Each has a time, the object's name, its generation before (0: none) and
    after (0: deleted), and its text, where it is short.
    """
    return self._ask("changes", since)

  def _ask(self, name: str, body: Any) -> Any:
    data = json.dumps(body).encode()
    with urllib.request.urlopen(f"{self.address}/-/{name}", data) as answer:
      return json.load(answer)


@contextmanager
def running_store() -> Iterator[Store]:
  """Start a store in a process of its own, and end it with this context."""
  command = [sys.executable, "-m", "tests.store"]
  root = Path(__file__).resolve().parents[1]
  with subprocess.Popen(
    command, cwd=root, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    try:
      yield Store(process.stdout.readline().strip())
    finally:
      process.kill()


@pytest.fixture(scope="session")
def store() -> Iterator[Store]:
  """The store that this process, and those that it starts, have as gs://."""
  pytest.importorskip("gcp_storage_emulator")
  with running_store() as running, pytest.MonkeyPatch.context() as patch:
    for name, value in running.environment.items():
      patch.setenv(name, value)
    yield running


@pytest.fixture(scope="session")
def bucket(store: Store) -> str:
  """The address of the store's bucket; a test takes a folder of its own."""
  return f"gs://{BUCKET}"


def serve() -> None:
  """Print the address, and serve until standard input is closed."""
  from http.server import ThreadingHTTPServer
  from io import BytesIO

  from gcp_storage_emulator import server
  from gcp_storage_emulator.handlers.buckets import create_bucket
  from gcp_storage_emulator.storage import Storage

  modes, changes = dict(CALM), list[dict[str, Any]]()
  finished: dict[str, bytes] = {}  # the last answers to resumable uploads
  rng, one_at_a_time = random.Random(0), threading.Lock()

  class PreconditionFailed(Exception):
    pass

  class Objects(Storage):
    """The emulator's objects, with preconditions, generations and a history."""

    condition: str | None = None  # of the request that is being answered
    read: str | None = None  # the generation of what it reads

    def __init__(self) -> None:
      super().__init__(use_memory_fs=True)
      self.generation = time.time_ns()

    def _write_config_to_file(self) -> None:
      pass  # it would copy all metadata at each change

    def _bucket_soft_delete_retention_seconds(self, bucket: str) -> int:
      return 0

    def _list_live_candidates(
      self, bucket: str, prefix: str | None = None
    ) -> list[tuple[str, Any]]:
      if not modes["lag"]:
        return super()._list_live_candidates(bucket, prefix)
      until, old = time.time() - modes["lag"], {}
      for change in changes:
        if change["time"] <= until:
          old[change["name"]] = change["fields"]
      names = [x for x in old if old[x] and x.startswith(prefix or "")]
      return [(name, old[name]) for name in names]

    def change(self, bucket: str, name: str, fields: Any, data: bytes) -> None:
      """Check the condition, and note what is about to be done.

      A resumable upload's last request has the condition in its address, too.
      """
      now = self.objects.get(bucket, {}).get(name, {})
      before = int(now.get("generation", 0))
      if self.condition is not None and int(self.condition) != before:
        raise PreconditionFailed
      self.generation += 1
      if fields:
        fields["generation"] = str(self.generation)
        now = datetime.now(UTC) + timedelta(seconds=modes["ahead"])
        fields["updated"] = now.isoformat().replace("+00:00", "Z")
      changes.append(
        {
          "time": time.time(),
          "name": name,
          "before": before,
          "after": self.generation if fields else 0,
          "text": data.decode("utf-8", "replace") if len(data) < 1000 else None,
          "fields": dict(fields),
        }
      )

    def get_file_obj(self, bucket: str, name: str) -> Any:
      fields = super().get_file_obj(bucket, name)
      self.read = fields["generation"]
      return fields

    def create_file(
      self, bucket: str, name: str, data: bytes, fields: Any, upload: Any = None
    ) -> None:
      self.change(bucket, name, fields, data)
      super().create_file(bucket, name, data, fields, upload)

    def delete_file(self, bucket: str, name: str) -> None:
      self.change(bucket, name, {}, b"")
      super().delete_file(bucket, name)

  objects = Objects()
  create_bucket(BUCKET, objects)

  def read_data(request: Any, query: dict[str, list[str]]) -> Any:
    """A request's body, whose bytes an email's parser might change."""
    kind = request.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
      return emulators_read_data(request, query)
    boundary = kind.partition("boundary=")[2].strip("\"'").encode()
    _, meta, content, _ = request.rfile.read().split(b"--" + boundary)
    end = b"\r\n" if meta.startswith(b"\r\n") else b"\n"
    head, _, data = content.partition(2 * end)
    return {
      "meta": json.loads(meta.partition(2 * end)[2]),
      "content": data.removesuffix(end),
      "content-type": head.partition(b":")[2].strip().decode(),
    }

  emulators_read_data, server._read_data = server._read_data, read_data

  class Handler(server.RequestHandler):
    protocol_version = "HTTP/1.1"  # connections are used again
    rfile: Any
    wfile: Any

    def __init__(self, *args: Any) -> None:
      super().__init__(objects, *args)

    def date_time_string(self, timestamp: float | None = None) -> str:
      return super().date_time_string(time.time() + modes["ahead"])

    def handle_expect_100(self) -> bool:
      return True  # the body comes anyway

    def answer(self, method: str) -> None:
      size = int(self.headers.get("Content-Length") or 0)
      body = self.rfile.read(size)
      if len(body) < size:  # the client was killed: it is no request
        self.close_connection = True
        return
      if self.path.startswith("/-/"):
        asked, answer = json.loads(body), None
        if self.path == "/-/modes":
          modes.update(asked)
        else:
          answer = changes[asked:]
        self.send(200, json.dumps(answer).encode())
        return
      wait = rng.uniform(0, modes["slow"])
      first = rng.choice((0, wait))
      time.sleep(first)
      luck = rng.random()
      if luck >= modes["errors"]:
        connection = self.rfile, self.wfile
        self.rfile, self.wfile = BytesIO(body), BytesIO()
        query = parse_qs(urlsplit(self.path).query)
        upload = query.get("upload_id", [""])[0]
        with one_at_a_time:
          objects.condition = query.get("ifGenerationMatch", [None])[0]
          objects.read = None
          try:
            if upload in finished:  # the answer was lost
              self.wfile.write(finished[upload])
            else:
              server.Router(self).handle(method)
          except PreconditionFailed:
            self.wfile = BytesIO()
            self.send(412)
          answer = self.wfile.getvalue()
          if answer.startswith(b"HTTP/1.1 501"):
            # what the emulator lacks, which gcsfs would ask for six times, with
            # longer and longer waits; this it takes for an answer
            answer = answer.replace(b"501 Not Implemented", b"400 Bad Request")
          if upload and answer.startswith(b"HTTP/1.1 200"):
            finished[upload] = answer
          if objects.read:
            number = f"\r\nx-goog-generation: {objects.read}\r\n"
            answer = answer.replace(b"\r\n", number.encode(), 1)
        self.rfile, self.wfile = connection
        time.sleep(wait - first)
        if luck >= modes["errors"] + modes["lost"]:
          self.wfile.write(answer)
          return
      if rng.random() < 0.5:
        self.send(503)
      else:
        self.close_connection = True  # without an answer

    def send(self, status: int, body: bytes = b"") -> None:
      self.send_response(status)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def do_GET(self) -> None:
      self.answer("GET")

    def do_POST(self) -> None:
      self.answer("POST")

    def do_PUT(self) -> None:
      self.answer("PUT")

    def do_PATCH(self) -> None:
      self.answer("PATCH")

    def do_DELETE(self) -> None:
      self.answer("DELETE")

  class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
      if not isinstance(sys.exception(), ConnectionError):  # a killed client
        super().handle_error(*args)

  logging.disable()  # the emulator's notes of what isn't there
  running = Server(("127.0.0.1", 0), Handler)
  print(f"http://127.0.0.1:{running.server_port}", flush=True)
  threading.Thread(target=running.serve_forever, daemon=True).start()
  sys.stdin.read()


if __name__ == "__main__":
  serve()
