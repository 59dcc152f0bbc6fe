"""How long a client of a busy server waits for the first token.

  python -m benchmarks.serve_first_token

A server of SmolLM2 with 16 rows and 16 adapters of VeRA, r = 256 on q and v, is
asked to continue one prompt, as a stream. First nothing else is asked. Then 32
clients ask again and again: the answers that end in a second are the capacity.
Then requests arrive at random (Poisson's process) at 70 % of that; and last 64
at once, of which most wait for a row. How long, the server's log says of each.

Writes serve_first_token.json, in seconds. Takes four minutes, and the machine
should do nothing else.
"""

import http.client
import json
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from absl import flags

from benchmarks.decode import DECODER, PROMPTS
from benchmarks.report import environment, load, write
from benchmarks.serve_load import served
from benchmarks.serving import LAYERS, random_leaves
from experiments import cli
from vera_jax.adapters.files import save_adapter
from vera_jax.models.folder import resolve
from vera_jax.train.runtime import prepare

ADAPTERS, BUSY, CROWD = 16, 32, 64
SHARE = 0.7  # of the capacity
WAITED = re.compile(r" 200 .* waited=([\d.]+)s")


def define_flags() -> None:
  flags.DEFINE_string("model", DECODER, "The decoder.")
  flags.DEFINE_integer("rank", 256, "Of VeRA.", 1)
  flags.DEFINE_integer("words", 32, "Tokens of an answer.", 2)
  flags.DEFINE_integer("idle", 20, "Requests to the idle server.", 2)
  flags.DEFINE_float("seconds", 90.0, "Of arrivals; half as long is busy.")
  flags.DEFINE_string("out", "results/benchmarks", "Where the result goes.")


def main() -> None:
  prepare()
  options = flags.FLAGS
  result = environment("serve_first_token")
  with tempfile.TemporaryDirectory() as temporary:
    adapters, log = Path(temporary) / "adapters", Path(temporary) / "log"
    base, layers = resolve(options.model), LAYERS["qv"]
    about, draw = random_leaves(base, "vera", options.rank, layers, spread=0.02)
    for number in range(ADAPTERS):
      save_adapter(adapters / f"a{number}", draw(), about=about)
    with served(
      log,
      *(f"--model={options.model}", "--name=base", f"--adapters={adapters}"),
    ) as (_, address):
      asked = Asked(urlsplit(address).netloc, options.words, log)
      result |= asked.measure(idle=options.idle, seconds=options.seconds)
  result["load_after"] = load()
  print(json.dumps(result, indent=2))
  print(write("serve_first_token", result, folder=options.out))


class Asked:
  """A server that is asked the same again and again, by any adapter."""

  def __init__(self, host: str, words: int, log: Path) -> None:
    self._host, self._words, self._log = host, words, log
    self._rng = np.random.default_rng(0)

  def measure(self, *, idle: int, seconds: float) -> dict[str, Any]:
    """Seconds to the first token: alone, at 70 % of the capacity, in a
    crowd."""
    self.ask(0, words=2)  # warms up what is no program
    alone = [self.ask(i % ADAPTERS, words=2) for i in range(idle)]
    capacity = self.capacity(seconds / 2)
    gaps = self._rng.exponential(
      1 / (SHARE * capacity), int(SHARE * capacity * seconds) + 1
    )
    before = self.waits()
    arrived = self.together(np.cumsum(gaps))
    between = self.waits()
    crowd = self.together(np.zeros(CROWD))
    after = self.waits()
    busy = summary(arrived)
    return {
      "idle": summary(alone),
      "capacity_per_second": capacity,
      "arrivals": {
        "per_second": len(gaps) / float(gaps.sum()),
        "first_token": busy,
        "wait_for_a_row": summary(between[len(before) :]),
      },
      "of_idle": busy["95th percentile"] / summary(alone)["95th percentile"],
      "crowd": {
        "clients": CROWD,
        "first_token": summary(crowd),
        "wait_for_a_row": summary(after[len(between) :]),
      },
    }

  def ask(self, adapter: int, *, words: int | None = None) -> float:
    """Seconds to the first token of an answer, all of which is read."""
    body = {"model": f"a{adapter}", "prompt": PROMPTS[0], "temperature": 0}
    body |= {"max_tokens": words or self._words, "stream": True}
    start = time.perf_counter()
    connection = http.client.HTTPConnection(self._host)
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), kind)
    answer = connection.getresponse()
    line = answer.readline()
    first = time.perf_counter() - start
    assert answer.status == 200 and b"choices" in line, line
    assert answer.read().endswith(b"[DONE]\n\n")
    connection.close()
    return first

  def capacity(self, seconds: float) -> float:
    """Answers in a second, where more clients ask than there are rows."""
    start = time.monotonic()
    first, last = start + seconds / 3, start + seconds  # once all are busy

    def again(number: int) -> int:
      count = 0
      while time.monotonic() < last:
        self.ask(number % ADAPTERS)
        count += first <= time.monotonic() < last
      return count

    with ThreadPoolExecutor(BUSY) as threads:
      return sum(threads.map(again, range(BUSY))) / (last - first)

  def together(self, times: np.ndarray) -> list[float]:
    """Seconds to the first token of requests that arrive at these times."""
    start, heard = time.monotonic(), [0.0] * len(times)

    def one(number: int, adapter: int) -> None:
      heard[number] = self.ask(adapter)

    threads = []
    for number, at in enumerate(times):
      time.sleep(max(0.0, start + at - time.monotonic()))
      adapter = int(self._rng.integers(ADAPTERS))
      threads.append(threading.Thread(target=one, args=(number, adapter)))
      threads[-1].start()
    for thread in threads:
      thread.join()
    assert all(heard)
    return heard

  def waits(self) -> list[float]:
    """How long each answer so far waited for a row."""
    time.sleep(0.5)  # the line of a request is written at its end
    return [float(x) for x in WAITED.findall(self._log.read_text())]


def summary(seconds: Sequence[float]) -> dict[str, float]:
  return {
    "count": len(seconds),
    "median": float(np.median(seconds)),
    "95th percentile": float(np.percentile(seconds, 95)),
    "longest": max(seconds),
  }


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
