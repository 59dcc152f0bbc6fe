"""Clients that go wrong, on a server of 200 adapters: is every answer right?

  python -m benchmarks.serve_load --model=BASE
  python -m benchmarks.serve_load --model=BASE --seconds=10 --adapters=20

The adapters are VeRA's with random numbers, so that each writes a text of its
own. What each writes alone, the likeliest words, a `Generator` says before the
server starts; behind any of the prompts all texts differ, so an answer says
which adapter gave it, and one wrong token makes a wrong answer. An adapter by
which two words come within 1e-3 of each other is not used: rounding might
choose between them.

64 clients (`serve_users.py`, run by locust: pip install locust) ask any adapter
for a long or a short text. One request in twenty is broken off, one in a
hundred has a body that is broken or too large. Meanwhile another client unloads
adapters, loads them, and gives a name to another adapter while its answer is
written.

Writes serve_load.json: requests by kind, what went wrong, what was compiled
once the server listened, its memory in the second half. Ends with exit code 1
where anything went wrong, but for the memory, which is reported alone.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks.report import environment, load, write
from benchmarks.serving import LAYERS, random_leaves
from experiments import cli
from vera_jax.adapters.files import SavedAdapter, save_adapter, tensors
from vera_jax.adapters.labels import join
from vera_jax.errors import UserError
from vera_jax.files import read_json, write_json
from vera_jax.generate.generator import Generator
from vera_jax.models.decoder import logits
from vera_jax.models.folder import resolve
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.train.runtime import prepare

# Prompts, and how many tokens each is continued by.
ASKED = [
  ("Once upon a time", 8),
  ("One day a girl named Lily went to the park.", 24),
  ("Tom had a big red ball. " * 4, 16),
  ("The dog and the cat sat on the mat, and then they ran. " * 8, 48),
]
CHANGED = 10  # adapters that are unloaded, loaded and replaced
CLOSE = 1e-3  # of logits between which rounding might choose
COMPILED = re.compile(r"Finished XLA compilation of (.*?) in ")  # jax's log


def define_flags() -> None:
  flags.DEFINE_string("model", None, "The base, a small decoder.")
  flags.DEFINE_integer("adapters", 200, "How many.", CHANGED + 2)
  flags.DEFINE_integer("rank", 64, "Of all.", 1)
  flags.DEFINE_float("spread", 1.0, "The deviation of their numbers.")
  flags.DEFINE_integer("clients", 64, "That ask at the same time.", 1)
  flags.DEFINE_integer("seconds", 600, "Of asking.", 1)
  flags.DEFINE_string("locust", "locust", "The command that runs the clients.")
  flags.DEFINE_string("out", "results/benchmarks", "Where the result goes.")


def main() -> None:
  prepare()
  options = flags.FLAGS
  if options.model is None:
    raise UserError("Give --model=BASE, a small decoder.")
  if shutil.which(options.locust) is None:
    raise UserError("The clients need locust: pip install locust.")
  result = environment("serve_load")
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    adapters, log = folder / "adapters", folder / "log"
    texts = write_adapters(resolve(options.model), adapters, options.adapters)
    changed = list(texts)[:CHANGED]
    asked = {"asked": ASKED, "texts": texts, "changed": changed}
    write_json(folder / "load.json", asked)
    print(f"{len(texts)} adapters, no two of which write the same", flush=True)
    with served(
      log,
      *(f"--model={options.model}", "--name=base", f"--adapters={adapters}"),
      "--allow_loading",
      JAX_LOG_COMPILES="1",
    ) as (server, address):
      before = len(COMPILED.findall(log.read_text()))
      clients = subprocess.Popen(
        [
          *(options.locust, "--headless", "--only-summary"),
          *("-f", Path(__file__).with_name("serve_users.py")),
          *("-H", address, "-u", str(options.clients + 1), "-r", "64"),
          *("-t", f"{options.seconds}s", "--stop-timeout=60"),
        ],
        env=os.environ | {"SERVE_LOAD": temporary},
      )
      memory = []
      while clients.poll() is None:
        memory.append(resident(server.pid))
        time.sleep(min(1.0, options.seconds / 20))
      server.send_signal(signal.SIGTERM)
      code = server.wait(60)
    said = log.read_text()
    result |= {
      "adapters": len(texts),
      "clients": options.clients,
      "seconds": options.seconds,
      **read_json(folder / "clients.json"),
      "compiled_before_listening": before,
      "compiled_afterwards": COMPILED.findall(said)[before:],
      "tracebacks": said.count("Traceback"),
      "exit_code": code,
    }
  second_half = memory[len(memory) // 2 :]
  low, high = min(second_half), max(second_half)
  result["kilobytes_in_second_half"] = [low, high]
  result["memory_grew_by"] = high / low - 1
  result["load_after"] = load()
  print(write("serve_load", result, folder=options.out))
  wrong = {
    name: result[name]
    for name in ("wrong", "compiled_afterwards", "tracebacks", "exit_code")
    if result[name]
  }
  print(
    json.dumps(result["requests"]), f"memory {result['memory_grew_by']:.2%}"
  )
  if wrong or not before:
    raise UserError(f"What went wrong: {json.dumps(wrong)}\n{said[-3000:]}")


def write_adapters(
  base: Path, folder: Path, count: int
) -> dict[str, list[str]]:
  """Adapters' folders, and the text that each writes behind each prompt."""
  options = flags.FLAGS
  about, draw = random_leaves(
    base, "vera", options.rank, LAYERS["qv"], spread=options.spread
  )
  first = restore_adapter(SavedAdapter(about, tensors(draw()), base))
  generator = Generator(first, keep_adapter=True)
  prompts = [generator.encode(text, max_new_tokens=n) for text, n in ASKED]
  texts: dict[str, list[str]] = {}
  known: set[tuple[int, str]] = set()
  for _ in range(10 * count):
    if len(texts) == count:
      return texts
    leaves = draw()
    params = join(generator.variables["params"], leaves)
    generator.variables = {**generator.variables, "params": params}
    answers = generator.ids(prompts, max_new_tokens=max(n for _, n in ASKED))
    answers = [ids[:n] for ids, (_, n) in zip(answers, ASKED, strict=True)]
    written = list(enumerate(map(generator.decode, answers)))
    if known.isdisjoint(written) and is_certain(generator, prompts, answers):
      known.update(written)
      name = f"a{len(texts)}"
      save_adapter(folder / name, leaves, about=about)
      texts[name] = [text for _, text in written]
  raise UserError(
    f"Of {10 * count} adapters only {len(texts)} write a text of their own:"
    " give a larger --spread."
  )


@partial(jax.jit, static_argnames="module")
def two_best(module: Any, variables: Any, ids: Any) -> Any:
  """The two highest logits behind each token, and the likeliest word."""
  scores = logits(module.apply(variables, ids))
  return *jax.lax.top_k(scores, 2)[:1], scores.argmax(-1)


def is_certain(
  generator: Generator, prompts: list[list[int]], answers: list[list[int]]
) -> bool:
  """Whether each word is the likeliest by more than rounding; also a check of
  the answers by one forward pass."""
  width = max(map(len, prompts)) + max(n for _, n in ASKED)
  ids = np.zeros((len(prompts), width), np.int32)
  for row, prompt, answer in zip(ids, prompts, answers, strict=True):
    row[: len(prompt) + len(answer)] = [*prompt, *answer]
  best, likeliest = jax.device_get(
    two_best(generator.module, generator.variables, ids)
  )
  for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    if (best[i, at, 0] - best[i, at, 1]).min() < CLOSE:
      return False
    assert likeliest[i, at].tolist() == answer
  return True


@contextmanager
def served(
  log: Path, *words: str, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
  """A server in a process of its own, and its address.

  Args:
    log: the file of what it says.
    words: flags of `vera-jax serve`.
    variables: of its environment.
  """
  command = [sys.executable, "-m", "experiments.serve", "--port=0", *words]
  with (
    log.open("w") as errors,
    subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
      env=os.environ | variables,
    ) as process,
  ):
    try:
      assert process.stdout is not None
      line = process.stdout.readline()
      if not line:
        raise UserError(f"The server did not start:\n{log.read_text()}")
      yield process, line.split()[-1]
    finally:
      process.terminate()
      process.wait(60)


def resident(process: int) -> int:
  """The memory of a process, in kB."""
  lines = Path(f"/proc/{process}/status").read_text().splitlines()
  return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS"))


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
