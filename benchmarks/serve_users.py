"""The clients of the load test, for locust; `serve_load.py` runs them.

$SERVE_LOAD is a folder. Its `load.json` says what is asked, what each adapter
answers, and which adapters are changed; `clients.json` is written at the end.
"""

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

from locust import HttpUser, between, constant, events, task

FOLDER = Path(os.environ["SERVE_LOAD"])
LOAD: dict[str, Any] = json.loads((FOLDER / "load.json").read_text())
TEXTS, ASKED = LOAD["texts"], LOAD["asked"]
CHANGED: list[str] = LOAD["changed"]
ASKED_FOR = sorted(TEXTS.keys() - set(CHANGED))
WRITE, JSON = "/v1/completions", {"Content-Type": "application/json"}


class Client(HttpUser):
  """A client that is right about what it gets."""

  abstract = True

  def ask(
    self, kind: str, adapter: str, number: int, *, name: str = "", **more: Any
  ) -> Any:
    """The answer to a prompt, as a context in which it is judged."""
    text, most = ASKED[number]
    body = {"model": name or adapter, "prompt": text, "max_tokens": most}
    return self.client.post(
      WRITE,
      json={**body, "temperature": 0, "stream": more.get("stream", False)},
      name=kind,
      catch_response=True,
      **more,
    )

  def judge(self, answer: Any, adapter: str, number: int) -> None:
    """Whether an answer is whole, and this adapter's."""
    if answer.status_code != 200:
      why = getattr(answer, "error", None) or answer.text[:200]
      answer.failure(f"lost: status {answer.status_code} {why!r}")
      return
    if answer.headers["content-type"].startswith("text/event-stream"):
      lines = [x for x in answer.iter_lines(decode_unicode=True) if x]
      if lines[-1:] != ["data: [DONE]"]:
        answer.failure(f"lost: a stream ends with {lines[-1:]}")
        return
      parts = [json.loads(x.removeprefix("data: ")) for x in lines[:-1]]
    else:
      parts = [answer.json()]
    said = "".join(part["choices"][0]["text"] for part in parts)
    right = TEXTS[adapter][number]
    if said != right:
      answer.failure(f"wrong: {adapter} said {said!r}, not {right!r}")


class Asker(Client):
  """Asks any adapter, and is sometimes rude."""

  wait_time = between(0.0, 0.2)

  @task(94)
  def answer(self) -> None:
    adapter, number = random.choice(ASKED_FOR), random.randrange(len(ASKED))
    stream = random.random() < 0.5
    kind = "stream" if stream else "answer"
    with self.ask(kind, adapter, number, stream=stream) as answer:
      self.judge(answer, adapter, number)

  @task(5)
  def break_off(self) -> None:
    adapter, number = random.choice(ASKED_FOR), len(ASKED) - 1
    if random.random() < 0.5:
      with self.ask("broken off", adapter, number, stream=True) as answer:
        next(answer.iter_lines(), None)
        answer.close()
        answer.success()
    else:  # before it has begun
      with self.ask("broken off", adapter, number, timeout=0.05) as answer:
        answer.success()

  @task(1)
  def bad_body(self) -> None:
    body = random.choice([b"{", b'{"model": 1}', b"\xff", b" " * (2**20 + 1)])
    with self.client.post(
      WRITE, data=body, headers=JSON, name="bad body", catch_response=True
    ) as answer:
      if answer.status_code in (400, 413):
        answer.success()
      else:
        answer.failure(f"a bad body: status {answer.status_code}")


class Changer(Client):
  """Unloads adapters and loads them; gives a name to one after another."""

  fixed_count = 1
  wait_time = constant(0.2)

  def change(self, path: str, **body: Any) -> None:
    self.client.post(f"/v1/{path}_lora_adapter", json=body, name=path)

  @task
  def unload_and_load(self) -> None:
    name = random.choice(CHANGED)
    self.change("unload", lora_name=name)
    with self.ask("unloaded", name, 0) as answer:
      if answer.status_code == 404:
        answer.success()
      else:
        answer.failure(f"wrong: unloaded, status {answer.status_code}")
    self.change("load", lora_name=name, lora_path=name)
    with self.ask("loaded", name, 0) as answer:
      self.judge(answer, name, 0)

  @task
  def replace(self) -> None:
    """While the old one writes, which it goes on to do."""
    old, new = random.sample(CHANGED, 2)
    number = len(ASKED) - 1
    name: dict[str, Any] = {"lora_name": "changing", "load_inplace": True}
    self.change("load", **name, lora_path=old)
    with self.ask(
      "replaced", old, number, name="changing", stream=True
    ) as answer:
      self.change("load", **name, lora_path=new)
      self.judge(answer, old, number)
    with self.ask("replaced", new, 0, name="changing") as answer:
      self.judge(answer, new, 0)


@events.quitting.add_listener
def report(environment: Any, **_: Any) -> None:
  """What was asked, and what went wrong."""
  kinds = environment.stats.entries.values()
  wrong = Counter(
    {
      f"{x.name}: {x.error}": x.occurrences
      for x in environment.stats.errors.values()
    }
  )
  for failure in environment.runner.exceptions.values():
    wrong[failure["traceback"]] += failure["count"]
  requests = {kind.name: kind.num_requests for kind in kinds}
  result = {"requests": requests, "wrong": wrong}
  (FOLDER / "clients.json").write_text(json.dumps(result))
