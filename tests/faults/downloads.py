"""A hub on this machine, which breaks off in the middle of a file."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.faults.ground import Ground, Trial

NAME = "some/encoder"
COMMIT = "0123456789" * 4


@contextmanager
def hub(folder: Path, breaks: int) -> Iterator[tuple[str, list[str]]]:
  """(address, what was asked for) of a hub with one model.

  So many times the connection ends in the middle of the weights.
  """
  asked: list[str] = []
  left = [breaks]

  class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
      pass

    def do_HEAD(self) -> None:
      self._answer(body=False)

    def do_GET(self) -> None:
      self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
      path = self.path.partition("?")[0]
      if path.startswith("/api/models/"):
        self._about(path)
        return
      file = folder / path.rpartition("/")[2]
      if not file.is_file():
        self.send_error(404)
        return
      data = file.read_bytes()
      start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
      self.send_response(206 if start else 200)
      self.send_header("Content-Length", str(len(data) - start))
      self.send_header("ETag", f'"{file.name}"')
      self.send_header("X-Repo-Commit", COMMIT)
      self.end_headers()
      if not body:
        return
      asked.append(file.name)
      data = data[start:]
      if file.suffix == ".safetensors" and left[0] > 0:
        left[0] -= 1
        data = data[: len(data) // 2]
      self.wfile.write(data)
      self.close_connection = True

    def _about(self, path: str) -> None:
      files = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
      about: Any = {"id": NAME, "sha": COMMIT, "siblings": files}
      if "/tree/" in path:
        about = [
          {
            "type": "file",
            "path": file.name,
            "size": file.stat().st_size,
            "oid": COMMIT,
          }
          for file in sorted(folder.iterdir())
        ]
      data = json.dumps(about).encode()
      self.send_response(200)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      self.wfile.write(data)

  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}", asked
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def downloads(ground: Ground) -> list[Trial]:
  """The weights break off twice, and then every time."""
  encoder = Path(ground.settings["model.name"])
  trials = []
  for breaks, name in ((2, "twice"), (10_000, "every time")):
    cache = ground.folder / f"hub-{breaks}"
    shutil.rmtree(cache, ignore_errors=True)
    with hub(encoder, breaks) as (address, asked):
      ended = ground.run(
        ground.folder / f"from-hub-{breaks}",
        environment={
          "HF_ENDPOINT": address,
          "HF_HOME": str(cache),
          "HF_HUB_OFFLINE": "0",
        },
        **{"model.name": NAME, "optim.epochs": 1},
      )
    times = asked.count("model.safetensors")
    told = "broke off 3 times" in ended.told and "Traceback" not in ended.told
    good = ended.code == 0 if breaks == 2 else ended.code == 1 and told
    seen = f"the weights were asked for {times} times; "
    seen += "then it trains" if breaks == 2 else "then a clear error"
    trials.append(
      Trial(f"a download breaks off {name}", 1, int(not good), None, seen)
    )
  return trials
