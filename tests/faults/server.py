"""A server in trouble: each name is answered as before, or not at all."""

import http.client
import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.everyday import DAY, is_sentence, movable_clock, set_clock
from tests.faults.fixtures import Outcome, Process, free_port
from tests.faults.table import (
  CHANGED,
  CLOCK,
  KILLED,
  REMOVED,
  SAVING,
  SLEPT,
  TWICE,
)
from tests.growth.programs import address, prompt, start, with_decoder

NAMES = ("ann", "bob", "base")
NEW = 8
SLEEP = 5.0  # seconds


class Server:
  """Starts a server, and knows what it has to answer."""

  def __init__(self, folder: Path) -> None:
    from tests.random_adapter import write_adapter

    folder.mkdir(parents=True)
    self.folder = folder
    self.launcher, self.model = with_decoder(folder)
    self.adapters = folder / "adapters"
    for number, name in enumerate(NAMES[:2]):
      about: dict[str, Any] = {
        "kind": "language_modelling",
        "spread": 0.5 + number,
      }
      write_adapter(self.adapters / name, base=self.model, **about)
    process = self.start()
    self.known = answers(address(process))
    process.kill_now()
    assert len({*self.known.values()}) == len(self.known)

  def start(self, port: int = 0, **options: Any) -> Process:
    return start(
      self.launcher,
      "serve",
      f"--model={self.model}",
      "--name=base",
      f"--adapters={self.adapters}",
      f"--port={port}",
      "--rows=4",
      **options,
    )

  def is_good(self, process: Process) -> bool:
    return answers(address(process)) == self.known


def answers(port: int) -> dict[str, str]:
  """What each name writes, the likeliest words."""
  return {name: ask(port, name)[1] for name in NAMES}


def ask(port: int, name: str, tokens: int = NEW) -> tuple[int, str]:
  """(status, text); the status is 0 where nobody is there."""
  try:
    return _ask(port, name, tokens)
  except (OSError, http.client.HTTPException) as error:
    return 0, str(error)


def _ask(port: int, name: str, tokens: int) -> tuple[int, str]:
  body = {"model": name, "prompt": prompt(3), "max_tokens": tokens}
  body["temperature"] = 0
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  kind = {"Content-Type": "application/json"}
  connection.request("POST", "/v1/completions", json.dumps(body), kind)
  answer = connection.getresponse()
  text = answer.read().decode()
  connection.close()
  if answer.status == 200:
    text = json.loads(text)["choices"][0]["text"]
  return answer.status, text


class Clients:
  """Some that ask all the time, and note each wrong answer."""

  def __init__(self, server: Server, port: int) -> None:
    self.answered, self.wrong = 0, list[str]()
    self.over = threading.Event()

    def ask_on(name: str) -> None:
      while not self.over.is_set():
        status, text = ask(port, name)
        self.answered += status == 200
        if status == 200 and text != server.known[name]:
          self.wrong.append(text)

    self.threads = [threading.Thread(target=ask_on, args=[x]) for x in NAMES]
    for thread in self.threads:
      thread.start()

  def end(self) -> bool:
    """Whether all that was answered was right."""
    self.over.set()
    for thread in self.threads:
      thread.join()
    return not self.wrong and self.answered > 0


def outcome(
  kind: str, fault: str, good: bool, seen: str, tried: int = 1
) -> Outcome:
  fault = f"server: {fault}"
  return Outcome(fault, tried, int(not good), None, seen, "server", kind)


def killed(server: Server, *, times: int, seed: int) -> Outcome:
  """kill -9 while it starts and while it is asked, and started anew."""
  rng, port = random.Random(seed), free_port()
  clients = Clients(server, port)
  for number in range(times):
    process = server.start(port)
    if number % 4:  # every fourth one while it starts
      address(process)
    time.sleep(rng.uniform(0, 1.0))
    process.kill_now()
  process = server.start(port)
  good = server.is_good(process)
  good &= clients.end()
  process.kill_now()
  seen = f"started anew; {clients.answered} answers, each as it should be"
  return outcome(KILLED, "kill -9", good, seen, times)


def troubles(folder: Path, *, times: int, seed: int) -> Iterator[Outcome]:
  """All of these."""
  server = Server(folder)
  process = server.start()
  port = address(process)

  second = server.start(port).end()
  good = is_sentence(second) and f"--port={port} can't be" in second.output
  seen = f"refused: {second.output.strip().splitlines()[-1]}"
  seen = seen.replace(str(port), "PORT")
  yield outcome(TWICE, "a second one on its port", good, seen)

  clients = Clients(server, port)
  time.sleep(1)
  process.send_signal(signal.SIGSTOP)
  time.sleep(SLEEP)
  process.send_signal(signal.SIGCONT)
  time.sleep(1)
  good = clients.end() and server.is_good(process)
  seen = "it holds no lease; what was asked meanwhile is answered when it wakes"
  yield outcome(SLEPT, f"asleep for {SLEEP:.0f} s", good, seen)

  clients = Clients(server, port)
  away = folder / "away"
  away.mkdir()
  for each in (server.adapters, server.model):
    shutil.move(each, away)
  good = server.is_good(process) and clients.end()
  for each in (server.adapters, server.model):
    shutil.move(away / each.name, each)
  seen = "it has read all that it needs, and answers on"
  yield outcome(REMOVED, "adapters and base removed", good, seen)

  heard: list[tuple[int, str]] = []
  asking = [
    threading.Thread(target=lambda x=x: heard.append(ask(port, x, 40)))
    for x in NAMES * 4
  ]
  for thread in asking:
    thread.start()
  time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  ended = process.end()
  for thread in asking:
    thread.join()
  whole = [text for status, text in heard if status == 200]
  good = ended.code == 0 and len(whole) > 0
  good &= all(status in (0, 200, 503) for status, _ in heard)
  if not good:
    print(ended.code, heard)
  seen = (
    f"exit code 0; of {len(asking)} requests {len(whole)} were answered whole,"
    " the others refused"
  )
  yield outcome(SAVING, "SIGTERM while it answers", good, seen)

  weights = server.model / "model.safetensors"
  before = weights.read_bytes()
  weights.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
  ended = server.start().end()
  weights.write_bytes(before)
  good = is_sentence(ended)
  line = ended.output.strip().splitlines()[-1].replace(f"{folder}/", "")
  yield outcome(CHANGED, "a changed base", good, f"refused: {line[:300]}")

  with movable_clock(folder / "clock") as (jump, environment):
    process = server.start(environment=environment)
    good = server.is_good(process)
    for seconds in (DAY, -DAY):
      clients = Clients(server, address(process))
      time.sleep(0.5)
      set_clock(jump, seconds)
      time.sleep(1)
      good &= clients.end() and server.is_good(process)
    process.kill_now()
  yield outcome(CLOCK, "the clock jumps", good, "it answers on", 2)

  yield killed(server, times=times, seed=seed)
