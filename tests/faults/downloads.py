"""A hub on this machine, which breaks off in the middle of a file."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.faults.fixtures import Launcher, Outcome

NAME = "some/encoder"
COMMIT = "0123456789" * 4
REVISIONS = ("main", "v1", COMMIT)
TOKEN = "hf_token"  # which uploads need


@contextmanager
def hub(folder: Path, breaks: int = 0) -> Iterator[tuple[str, list[str]]]:
  """(address, names of the requested files) of a hub with one model.

  The first `breaks` times the connection ends in the middle of the weights.
  Uploads go into the folder.
  """
  requested: list[str] = []
  left = [breaks]

  class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
      pass

    def do_HEAD(self) -> None:
      self._answer(body=False)

    def do_GET(self) -> None:
      self._answer(body=True)

    def do_POST(self) -> None:
      body = self.rfile.read(int(self.headers["Content-Length"]))
      allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
      self.send_response(200 if allowed else 401)
      self.end_headers()
      address = f"http://{self.headers['Host']}"
      answer = _upload(folder, address, self.path, body) if allowed else {}
      self.wfile.write(json.dumps(answer).encode())

    def _answer(self, *, body: bool) -> None:
      path = self.path.partition("?")[0]
      _, _, revision = path.partition("/revision/")
      if revision and revision not in REVISIONS:
        self.send_response(404)
        self.send_header("X-Error-Code", "RevisionNotFound")
        self.end_headers()
        return
      if path.startswith("/api/models/"):
        data, headers = _listing(folder, path), {}
        start, name = 0, "listing.json"
      else:
        file = folder / path.rpartition("/")[2]
        if not file.is_file():
          self.send_error(404)
          return
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        data, name = file.read_bytes()[start:], file.name
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
      self.send_response(206 if start else 200)
      self.send_header("Content-Length", str(len(data)))
      for key, value in headers.items():
        self.send_header(key, value)
      self.end_headers()
      if not body:
        return
      requested.append(name)
      if name.endswith(".safetensors") and left[0] > 0:
        left[0] -= 1
        data = data[: len(data) // 2]
      self.wfile.write(data)
      self.close_connection = True

  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}", requested
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def _listing(folder: Path, path: str) -> bytes:
  """What the hub's API answers about the model, or its tree of files."""
  files = sorted(folder.iterdir())
  siblings = [{"rfilename": file.name} for file in files]
  answer: Any = {"id": NAME, "sha": COMMIT, "siblings": siblings}
  if "/tree/" in path:
    answer = [
      {
        "type": "file",
        "path": file.name,
        "size": file.stat().st_size,
        "oid": COMMIT,
      }
      for file in files
    ]
  return json.dumps(answer).encode()


def _upload(folder: Path, address: str, path: str, body: bytes) -> Any:
  """What the hub's API answers to each request of an upload."""
  if "/preupload/" in path:
    names = [file["path"] for file in json.loads(body)["files"]]
    how = {"uploadMode": "regular", "shouldIgnore": False}
    return {"files": [{"path": name, **how} for name in names]}
  if "/commit/" in path:
    for line in map(json.loads, body.splitlines()):
      if line["key"] == "file":
        content = base64.b64decode(line["value"]["content"])
        (folder / line["value"]["path"]).write_bytes(content)
    url = f"{address}/{NAME}/commit/{COMMIT}"
    return {"success": True, "commitOid": COMMIT, "commitUrl": url}
  return {"url": f"{address}/{NAME}", "warnings": []}  # create, validate-yaml


def downloads(launcher: Launcher) -> list[Outcome]:
  """The weights break off twice, and then every time."""
  outcomes = []
  for breaks, name in ((2, "twice"), (10_000, "every time")):
    cache = launcher.folder / f"hub-{breaks}"
    shutil.rmtree(cache, ignore_errors=True)
    with hub(launcher.settings["model.name"], breaks) as (address, requested):
      ended = launcher.run(
        launcher.folder / f"from-hub-{breaks}",
        environment={
          "HF_ENDPOINT": address,
          "HF_HOME": str(cache),
          "HF_HUB_OFFLINE": "0",
        },
        **{"model.name": NAME, "optim.epochs": 1},
      )
    if breaks == 2:
      good, end = ended.code == 0, "then it trains"
    else:
      clear = f"The download of {NAME} broke off" in ended.output
      clear = clear and "Traceback" not in ended.output
      good, end = ended.code == 1 and clear, "then a clear error"
    times = requested.count("model.safetensors")
    seen = f"the weights were asked for {times} times; {end}"
    fault = f"a download breaks off {name}"
    outcomes.append(Outcome(fault, 1, int(not good), None, seen))
  return outcomes
