"""Load on a server whose adapters answer with their own names, by locust.

  python -m benchmarks.serve_adapters --model=BASE --out=words --adapters=200
  vera-jax serve --model=BASE --name=base --adapters=words --allow_loading
  locust -f benchmarks/serve_load.py --headless -u 64 -r 16 -t 10m \\
    -H http://localhost:8000

One in twenty requests is broken off, one in a hundred has a body that is broken
or too large; one user unloads adapters and loads them again, and another one
watches the server's memory, where $SERVER_PID names its process. The exit code
is 1 where an answer was another adapter's, or a request was lost.
"""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from locust import HttpUser, between, constant, events, task

from benchmarks.serve_words import PROMPTS

CHANGED = 10  # adapters that are unloaded and loaded again
memory: list[tuple[float, int]] = []  # (seconds, kB)


def pages(pid: str) -> int:
  """Of a process's resident memory, in kB."""
  lines = Path(f"/proc/{pid}/status").read_text().splitlines()
  return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS"))


class Asker(HttpUser):
  """Asks adapters for their names; knows by the answer who gave it."""

  wait_time = between(0.0, 0.5)

  def on_start(self) -> None:
    models = self.client.get("/v1/models").json()["data"]
    names = sorted(model["id"] for model in models if model["parent"])
    self.changed, self.names = names[:CHANGED], names[CHANGED:]
    token = os.environ.get("VERA_JAX_TOKEN")
    if token:
      self.client.headers["Authorization"] = f"Bearer {token}"

  def ask(self, name: str, **settings: Any) -> Any:
    body = {"model": name, "prompt": random.choice(PROMPTS), "temperature": 0}
    return self.client.post(
      "/v1/completions",
      json={**body, "max_tokens": 12, **settings},
      catch_response=True,
      stream=settings.get("stream", False),
    )

  @task(94)
  def whole(self) -> None:
    name = random.choice(self.names)
    stream = random.random() < 0.5
    with self.ask(name, stream=stream) as answer:
      if answer.status_code == 429:  # said, and not lost
        answer.success()
      elif answer.status_code != 200:
        answer.failure(f"status {answer.status_code}")
      else:
        text = self.streamed(answer) if stream else self.text(answer.json())
        if text.strip() != name:
          answer.failure(f"a wrong answer: {text!r} by {name}")

  def text(self, value: dict[str, Any]) -> str:
    return value["choices"][0]["text"]

  def streamed(self, answer: Any) -> str:
    lines = [x for x in answer.iter_lines(decode_unicode=True) if x]
    if lines[-1] != "data: [DONE]":
      return lines[-1]  # it has the error
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(map(self.text, events))

  @task(5)
  def broken_off(self) -> None:
    with self.ask(random.choice(self.names), stream=True, max_tokens=60) as got:
      next(got.iter_lines(), None)
      got.close()
      got.success()

  @task(1)
  def bad(self) -> None:
    body = random.choice([b"{", b'{"model": 1}', b" " * 2**21])
    headers = {"Content-Type": "application/json"}
    with self.client.post(
      "/v1/completions", data=body, headers=headers, catch_response=True
    ) as answer:
      if answer.status_code in (400, 413):
        answer.success()


class Changer(HttpUser):
  """Unloads adapters and loads them again, asked before and after."""

  fixed_count = 1
  wait_time = constant(0.5)
  on_start = Asker.on_start

  @task
  def change(self) -> None:
    name = random.choice(self.changed)
    body = {"lora_name": name}
    self.client.post("/v1/unload_lora_adapter", json=body)
    with self.client.post(
      "/v1/completions",
      json={"model": name, "prompt": PROMPTS[0]},
      catch_response=True,
    ) as answer:
      if answer.status_code == 404:
        answer.success()
      else:
        answer.failure("an adapter that was unloaded answers")
    self.client.post("/v1/load_lora_adapter", json={**body, "lora_path": name})


class Watcher(HttpUser):
  """Notes the server's memory."""

  fixed_count = 1
  wait_time = constant(5)

  @task
  def look(self) -> None:
    self.client.get("/healthz")
    if pid := os.environ.get("SERVER_PID"):
      memory.append((time.monotonic(), pages(pid)))


@events.quitting.add_listener
def report(environment: Any, **_: Any) -> None:
  """What the memory did in the second half; the exit code."""
  late = [kb for at, kb in memory if at >= (memory[0][0] + memory[-1][0]) / 2]
  if late:
    low, high = min(late), max(late)
    print(f"memory: {low:,} to {high:,} kB, {100 * (high / low - 1):.2f} %")
  environment.process_exit_code = int(environment.stats.total.num_failures > 0)
