"""The commands that run for long, each with what says how far it has come."""

import http.client
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.fixtures import DATA, Launcher, Process
from vera_jax.errors import UserError

CLIENTS = 8  # requests at once
PACE = 20  # requests begun in a second, at most
NEW = 8  # tokens of a text
LONG = {"n_positions": 64}  # tokens of the decoder


class Running(NamedTuple):
  """A command that runs.

  Attributes:
    process: its process.
    done: how much it has done so far.
  """

  process: Process
  done: Callable[[], int]


class Program(NamedTuple):
  """What is run for long.

  Attributes:
    what: is counted, for a table.
    number: how many.
    start: begins with a folder and a count, and ends it with its context.
  """

  what: str
  number: int
  start: Callable[[Path, int], Any]


class Lines:
  """Counts the lines of a growing file that have a word in them."""

  def __init__(self, file: Path, word: str = "", each: int = 1) -> None:
    self.file, self.word, self.each = file, word.encode(), each
    self.at = self.count = 0

  def __call__(self) -> int:
    with suppress(FileNotFoundError), self.file.open("rb") as file:
      file.seek(self.at)
      text = file.read()
      text = text[: text.rfind(b"\n") + 1]
      self.at += len(text)
      self.count += sum(self.word in line for line in text.splitlines())
    return self.count * self.each


@contextmanager
def steps(folder: Path, count: int) -> Iterator[Running]:
  """Training, with an evaluation and a save every 500 steps."""
  launcher = Launcher(folder, epochs=-(-count // 500))
  settings: dict[str, Any] = {"data.max_train_examples": 2000, "log.every": 10}
  process = launcher.start(folder / "run", **settings)
  metrics = folder / "run/metrics.jsonl"
  with ended(process):
    yield Running(process, Lines(metrics, '"loss"', each=10))


@contextmanager
def evaluations(folder: Path, count: int) -> Iterator[Running]:
  """Training, with an evaluation and a save every ten steps."""
  process = Launcher(folder, epochs=count).start(folder / "run")
  with ended(process):
    yield Running(process, Lines(folder / "run/metrics.jsonl", '"epoch"'))


@contextmanager
def lines(folder: Path, count: int) -> Iterator[Running]:
  """Texts that a classifier answers, from a file."""
  from tests.random_adapter import write_adapter

  launcher = Launcher(folder, epochs=1)
  write_adapter(folder / "adapter", base=launcher.settings["model.name"])
  rows = (DATA / "train.tsv").read_text().splitlines()[1:]
  texts = ["\t".join(row.split("\t")[1:3]) for row in rows]
  some = itertools.islice(itertools.cycle(texts), count)
  (folder / "texts.tsv").write_text("\n".join(some) + "\n")
  process = start(
    launcher,
    "predict",
    f"--adapter={folder / 'adapter'}",
    f"--input={folder / 'texts.tsv'}",
  )
  with ended(process):
    yield Running(process, Lines(process.output, "entailment"))


@contextmanager
def texts(folder: Path, count: int) -> Iterator[Running]:
  """Texts that a decoder writes, by words that are drawn."""
  launcher, model = with_decoder(folder)
  prompts = [{"prompt": prompt(number)} for number in range(count)]
  rows = "".join(json.dumps(row) + "\n" for row in prompts)
  (folder / "prompts.jsonl").write_text(rows)
  process = start(
    launcher,
    "generate",
    f"--model={model}",
    f"--input={folder / 'prompts.jsonl'}",
    f"--max_new_tokens={NEW}",
    "--temperature=1",
  )
  with ended(process):
    yield Running(process, Lines(process.output, '"answer"'))


@contextmanager
def requests(folder: Path, count: int) -> Iterator[Running]:
  """A server that is asked by eight clients at once.

  Some read what is written word by word, some go away in the middle, some ask
  for what there is not, and adapters are replaced.
  """
  from tests.random_adapter import write_adapter

  launcher, model = with_decoder(folder)
  for number, name in enumerate(("ann", "bob")):
    write_adapter(
      folder / "adapters" / name,
      base=model,
      kind="language_modelling",
      spread=0.2 + number,
    )
  process = start(
    launcher,
    "serve",
    f"--model={model}",
    "--name=base",
    f"--adapters={folder / 'adapters'}",
    "--allow_loading",
    "--rows=4",
    "--port=0",
  )
  with ended(process):
    port = address(process)
    answered = itertools.count(1)
    so_far, began = 0, time.monotonic()
    stop = threading.Event()

    def ask_on(client: int) -> None:
      nonlocal so_far
      for number in range(client, count, CLIENTS):
        if stop.wait(max(0, began + number / PACE - time.monotonic())):
          return
        ask(port, number, folder)
        so_far = next(answered)

    with ThreadPoolExecutor(CLIENTS) as threads:
      clients = [threads.submit(ask_on, client) for client in range(CLIENTS)]

      def done() -> int:
        for client in clients:
          if client.done():
            client.result()  # raises what went wrong
        return so_far

      try:
        yield Running(process, done)
      finally:
        stop.set()


PROGRAMS = {
  "training": Program("steps", 10_000, steps),
  "evaluating": Program("evaluations and saves", 200, evaluations),
  "predicting": Program("lines", 20_000, lines),
  "writing": Program("texts", 2_000, texts),
  "serving": Program("requests", 72_000, requests),
}


def ask(port: int, number: int, folder: Path) -> None:
  """One request to the server, by its number."""
  body: dict[str, Any] = {
    "model": ("ann", "bob", "base")[number % 3],
    "prompt": prompt(number),
    "max_tokens": NEW,
  }
  address, expected = "/v1/completions", 200
  if number % 10 == 3:
    body["model"], expected = "nobody", 404
  elif number % 10 == 5:
    address = "/v1/load_lora_adapter"
    adapter = str(folder / "adapters/ann")
    body = {"lora_name": "ann", "lora_path": adapter, "load_inplace": True}
  elif number % 10 >= 7:
    body |= {"stream": True}
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  kind = {"Content-Type": "application/json"}
  connection.request("POST", address, json.dumps(body), kind)
  answer = connection.getresponse()
  # a stream's first bytes alone, of one that goes away
  text = answer.read(20 if number % 10 == 9 else None)
  connection.close()
  if answer.status != expected:
    raise UserError(f"Request {number}: {answer.status} {text!r}")


def prompt(number: int) -> str:
  """One to ten words."""
  return " ".join(f"word{(number + i) % 20}" for i in range(1 + number % 10))


def with_decoder(folder: Path) -> tuple[Launcher, Path]:
  """A launcher, for its environment, and a tiny decoder."""
  from tests.tasks.decoder_files import GPT2, write_decoder

  model = folder / "decoder"
  model.mkdir()
  write_decoder(model, GPT2 | LONG)
  return Launcher(folder, epochs=1), model


def start(
  launcher: Launcher,
  command: str,
  *flags: str,
  environment: Mapping[str, str] | None = None,
) -> Process:
  return Process(
    [sys.executable, "-m", f"experiments.{command}", *flags],
    output=launcher.folder / f"output-{time.monotonic_ns()}",
    env={**launcher.environment(), **(environment or {})},
  )


def address(process: Process) -> int:
  """The port, once the server listens."""
  while process.poll() is None:
    if match := re.search(r"on http://[\d.]+:(\d+)", said(process)):
      return int(match[1])
    time.sleep(0.1)
  raise UserError(f"The server ended:\n{said(process)}")


def said(process: Process) -> str:
  return process.output.read_text()


@contextmanager
def ended(process: Process) -> Iterator[None]:
  """Kill what still runs at the end."""
  try:
    yield
  finally:
    process.kill_now()
