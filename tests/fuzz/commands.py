"""Commands that are mistyped, starved, interrupted or badly surrounded.

  python -m tests.fuzz.commands --minutes=10
  python -m tests.fuzz.commands --seed=1 --number=17     # one of them again
  python -m tests.fuzz.commands --count=0 --disk         # each on a full disk

Each command of `COMMANDS` is given as it should be, which tells its exit code,
and then again and again with one or two words changed or in other surroundings:
standard output full or closed, no home, a folder that can't be written, no
space in the middle of a write, a disk that is full or almost, Ctrl-C at a
random moment. It must end by a documented exit code, without a traceback and
with five lines of errors at most. After what it could do nothing about, the
same command must work.

One process imports what takes seconds; each command is a fork of it, without
the rights of root, to whom no folder is closed.
"""

import argparse  # for absl's flags are those of the commands that are tried
import ctypes
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from experiments import handle_ctrl_c
from experiments.cli import EXIT_CODES
from tests.fuzz import clean
from vera_jax.terminal import LINES, printable

FOUND = Path(__file__).with_name("found") / "commands.json"
TEXT = (
  "train --config=text --config.data.train=rows.csv --config.data.cache_dir=c"
  " --config.data.text=('premise','hypothesis') --config.model.name=base"
  " --config.optim.epochs=1 --config.vera.rank=2 --config.optim.batch_size=4"
  " --workdir=out"
)
# Each with words that work, in a folder that `write_folder` has made.
COMMANDS = (
  "predict --adapter=adapter --input=texts.tsv",
  "predict --adapter=adapter --input=rows.csv --format=jsonl",
  "merge --adapter=adapter --out=out",
  "peft export --adapter=adapter --out=out --as=lora",
  "peft import --adapter=peft --base=base --out=out",
  "gguf export --adapter=words --out=out.gguf",
  "gguf import --adapter=a.gguf --base=decoder --out=out",
  "generate --model=decoder --prompt=river --max_new_tokens=2",
  "generate --model=decoder --input=prompts.jsonl --max_new_tokens=2",
  "chat --model=decoder --max_new_tokens=2",
  "answer --model=decoder --questions=judge.jsonl --max_new_tokens=2 --out=out",
  "report runs --format=csv --out=out",
  "report runs --format=markdown --out=",
  "e2e_score --references=references.txt --outputs=outputs.txt",
  "launch --to=slurm --command=train --topology=gpu:1x1 --config=rte"
  " --workdir=/x --env_file=env --out=out",
  "sweep --config=sweeps/rank:minilm --workdir=out --dry_run",
  "train --config=rte --print_config",
  "help merge",
  "serve --adapters=adapters --model=base --port=1 --token_file=env",
  "push --adapter=adapter --to=owner/name",
  "plan --config=rte --topology=v5e:2x2 --methods=x",
  "pictures out",
  "ridge --config=images/cifar10:dinov2 --config.data.source=no --workdir=out",
  "rehearse --tokenizers=base",
  "reproduce x",
  "table1 --csv",
  TEXT,
)
# These compile, draw figures or start Java.
HEAVY = (
  *("train --config=text", "report runs --format=csv", "answer", "merge"),
  *("predict", "generate", "chat", "gguf", "peft export", "e2e_score"),
)
VALUES = (
  *("", " ", "-1", "0", "1e400", "nan", "9" * 30, "None", "[]", "()", "'"),
  *("..", "/dev/full", "/dev/random", "/proc/self/mem", "x" * 1000),
  *("x/" * 500, "a\nb", "\x1b[2J", "ß", "\udcff", "gs:/x", "s3://b/x", "~x"),
  *("-", "--", "@", "rte:large", "adapter", "base", "rows.csv", "locked"),
)
HOWS = (
  *("plain", "plain", "plain", "full", "pipe", "ascii", "no home", "narrow"),
  *("read-only", "small", "small", "disk", "interrupt", "interrupt"),
)
FAULTS = {"full", "pipe", "read-only", "small", "disk", "interrupt"}
FILLER = "filler"  # the file that leaves no more room on a disk
ROOMS = 0, 100, 2000, 20_000  # bytes that a file, or a disk, has left
DISK = 2**26  # bytes of a disk
SECONDS = 120.0  # after which a command hangs
CAPABILITIES = 0x20080522  # the version of capset's arguments


class Attempt(NamedTuple):
  """A command's words, its surroundings, and a number that these need."""

  words: tuple[str, ...]
  how: str = "plain"
  amount: float = 0.0


def write_folder(folder: Path) -> None:
  """What the commands of `COMMANDS` read."""
  from tests.models.gguf_folders import random_folder
  from tests.random_adapter import write_adapter
  from vera_jax.peft_io import export_adapter
  from vera_jax.peft_io.gguf import export_gguf_adapter

  os.chdir(folder)
  here = Path()
  clean.write_model(here / "base", "bert")
  clean.write_wordpiece(here / "base")
  write_adapter(here / "adapter", base=here / "base")
  write_adapter(here / "adapters/ann", base=here / "base")
  export_adapter(here / "adapter", here / "peft")
  random_folder(here / "decoder", "llama")
  about: dict[str, Any] = {"kind": "language_modelling", "targets": ["q_proj"]}
  write_adapter(here / "words", base=here / "decoder", **about)
  export_gguf_adapter(here / "words", here / "a.gguf")
  clean.write_table(here, "train.csv")
  (here / "train.csv").rename(here / "rows.csv")
  clean.write_scoring(here)
  clean.write_questions(here)
  clean.write_run(here / "runs")
  (here / "texts.tsv").write_text("sentence1\tsentence2\nword1\tword2\n")
  (here / "prompts.jsonl").write_text('{"prompt": "the river"}\n' * 2)
  (here / "stdin").write_text("the river\nlow\n")
  (here / "env").write_text("TOKEN=x")


def changed(words: Sequence[str], rng: random.Random) -> tuple[str, ...]:
  """A command's words with one of them mistyped, or another beside them."""
  command, *rest = words
  at = rng.randrange(len(rest))
  name, equals, value = rest[at].partition("=")
  what = rng.choice(("value", "value", "drop", "name", "double", "add", "key"))
  if what == "value":
    rest[at] = f"{name}={rng.choice(VALUES)}" if equals else rng.choice(VALUES)
  elif what == "drop":
    del rest[at]
  elif what == "name":
    cut = rng.randrange(1, len(name)) if len(name) > 1 else 0
    rest[at] = f"{name[:cut]}{name[cut + 1 :]}{equals}{value}"
  elif what == "double":
    rest.append(f"{name}{equals}{rng.choice((value, *VALUES))}")
  elif what == "add":
    others = [word for line in COMMANDS for word in line.split()[1:]]
    rest.append(rng.choice((*others, *VALUES)))
  else:
    rest.append(f"--config.{rng.choice(_keys())}={rng.choice(VALUES)}")
  return (command, *rest)


def _keys() -> list[str]:
  from flax.traverse_util import flatten_dict

  from configs import common

  return sorted(flatten_dict(common.get_config().to_dict(), sep="."))


class Tried(NamedTuple):
  """How a command ended: its exit code, what it said, in which time."""

  code: int
  said: str
  seconds: float


def give(attempt: Attempt, folder: Path) -> Tried:
  """The command in a process of its own, whose current folder this is."""
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
  read, write = os.pipe()
  began = time.monotonic()
  child = os.fork()
  if not child:
    os.close(read)
    _be(attempt, folder, write)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
  os.close(write)
  parts: list[bytes] = []

  def collect() -> None:
    with open(read, "rb") as said:
      parts.append(said.read())

  thread = threading.Thread(target=collect)
  thread.start()
  if attempt.how == "interrupt":
    thread.join(attempt.amount)
    os.kill(child, signal.SIGINT)
  thread.join(SECONDS)
  if thread.is_alive():
    os.kill(child, signal.SIGKILL)
    thread.join()
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  said = b"".join(parts).decode("utf-8", "replace")
  return Tried(code, said, time.monotonic() - began)


def _be(attempt: Attempt, folder: Path, stderr: int) -> None:
  """What the child does, to its end: it becomes the command."""
  how, code = attempt.how, 1
  os.chdir(folder)
  os.environ.update(HOME=str(folder / "home"), JAX_PLATFORMS="cpu")
  os.environ.update(HF_HUB_OFFLINE="1", TMPDIR=str(folder / "tmp"))
  tempfile.tempdir = None
  os.dup2(os.open("stdin", os.O_RDONLY), 0)
  if how == "pipe":
    read, stdout = os.pipe()
    os.close(read)
  else:
    stdout = os.open("/dev/full" if how == "full" else os.devnull, os.O_WRONLY)
  os.dup2(stdout, 1)
  os.dup2(stderr, 2)
  encoding = "ascii" if how == "ascii" else "utf-8"
  sys.stdout = open(1, "w", encoding=encoding, closefd=False)
  sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace")
  if how == "no home":
    os.environ["HOME"] = "/proc/none"  # nor can it be made
  if how == "narrow":
    os.environ["COLUMNS"] = "40"
  if how == "read-only":
    os.chmod(folder, 0o555)
  if how == "small":
    most = int(attempt.amount)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
  header = (ctypes.c_uint32 * 2)(CAPABILITIES, 0)
  ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())  # none is left
  # as if they were imported now
  for name in [x for x in sys.modules if x.startswith("experiments.")]:
    if name != "experiments.cli":
      del sys.modules[name]
  try:
    handle_ctrl_c()
    sys.argv = ["vera-jax", *attempt.words]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    runpy.run_module("vera_jax", run_name="__main__", alter_sys=True)
    code = 0
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else bool(end.code)
  except BaseException:
    traceback.print_exc()
  finally:
    try:
      sys.stdout.flush()
      sys.stderr.flush()
    except OSError:
      code = 120  # as Python ends there
    os._exit(code)


class Place:
  """A folder for commands, made anew for each attempt."""

  def __init__(self, top: Path) -> None:
    self.clean, self.now = top / "clean", top / "a" / "now"
    self.clean.mkdir()
    child = os.fork()  # the clean files are made by JAX, which must not fork
    if not child:
      try:
        write_folder(self.clean)
      except BaseException:
        traceback.print_exc()
        os._exit(1)
      os._exit(0)
    if os.waitpid(child, 0)[1]:
      raise RuntimeError("the clean files can't be written")
    # what each says when it is given as it should be
    self.usual: dict[str, Tried] = {}

  def renew(self, room: float | None = None) -> None:
    """Make the folder anew.

    Args:
      room: if given, it is a disk of its own, with so many bytes left.
    """
    self.clear()
    self.now.mkdir(parents=True)
    if room is not None:
      kind = ["-t", "tmpfs", "-o", f"size={DISK}", "tmpfs"]
      subprocess.run(["mount", *kind, str(self.now)], check=True)
    shutil.copytree(self.clean, self.now, dirs_exist_ok=True)
    for name in ("home", "tmp", "locked"):
      (self.now / name).mkdir()
    (self.now / "locked").chmod(0o000)
    if room is not None:
      with (self.now / FILLER).open("wb", buffering=0) as file:
        with suppress(OSError):
          while shutil.disk_usage(self.now).free > room:
            file.write(bytes(4096))

  def clear(self) -> None:
    if self.now.exists():
      os.chmod(self.now, 0o755)
      if self.now.is_mount():
        subprocess.run(["umount", "--lazy", str(self.now)], check=True)
      shutil.rmtree(self.now, ignore_errors=True)

  def give_usual(self, line: str) -> Tried:
    if line not in self.usual:
      self.renew()
      self.usual[line] = give(Attempt(tuple(line.split())), self.now)
    return self.usual[line]

  def finding(self, attempt: Attempt) -> str:
    """What is wrong with how a command ended; "" if nothing is."""
    self.renew(attempt.amount if attempt.how == "disk" else None)
    tried = give(attempt, self.now)
    if wrong := _wrong(tried, attempt.words[0]):
      return wrong
    line = " ".join(attempt.words)
    if tried.code and attempt.how in FAULTS and line in COMMANDS:
      os.chmod(self.now, 0o755)
      (self.now / FILLER).unlink(missing_ok=True)
      again = give(attempt._replace(how="plain"), self.now)
      wrong = _wrong(again, attempt.words[0])
      if wrong or again.code != self.give_usual(line).code:
        return f"given again: {again.code}, {wrong or again.said[-500:]}"
    return ""


def _wrong(tried: Tried, command: str) -> str:
  end = tried.said[-1500:]
  if tried.code not in EXIT_CODES:
    return f"exit code {tried.code} after {tried.seconds:.0f} s: {end}"
  if "Traceback" in tried.said:
    return f"a traceback: {end}"
  if printable(tried.said, keep=LINES) != tried.said:
    return f"control characters: {end!r}"
  lines = tried.said.splitlines()
  # a run says on standard error how it goes on
  if tried.code in (1, 2) and len(lines) > 5 and command != "train":
    return f"{len(lines)} lines: {end}"
  if max(map(len, lines), default=0) > 1500:
    return f"a line of {max(map(len, lines))} characters: {end}"
  return ""


def drawn(rng: random.Random, place: Place, lines: Sequence[str]) -> Attempt:
  line = rng.choice(lines)
  words, how = tuple(line.split()), rng.choice(HOWS)
  if how == "disk" and os.geteuid():  # mounting one needs root
    how = "small"
  if how not in FAULTS or rng.random() < 0.2:
    words = changed(words, rng)
  if how == "interrupt":
    return Attempt(words, how, place.give_usual(line).seconds * rng.random())
  return Attempt(words, how, rng.choice(ROOMS))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, help="in place of --count")
  parser.add_argument("--count", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--number", type=int, help="this attempt alone")
  parser.add_argument("--quick", action="store_true", help="not the slow ones")
  parser.add_argument("--disk", action="store_true", help="full ones, for all")
  parser.add_argument("--usual", action="store_true", help="all, as they are")
  chosen = parser.parse_args()
  sys.argv[1:] = []
  # what the commands import; none of these asks for a device
  import transformers  # noqa: F401

  import vera_jax.export.hf
  import vera_jax.report
  import vera_jax.serve.predictor
  import vera_jax.sweep.plan
  import vera_jax.train.loop  # noqa: F401

  lines = [
    line for line in COMMANDS if not (chosen.quick and line.startswith(HEAVY))
  ]
  attempts: list[Attempt] = []
  wrong: list[Attempt] = []
  ends = time.monotonic() + 60 * (chosen.minutes or 0)
  with tempfile.TemporaryDirectory() as top:
    place = Place(Path(top))

    def look(attempt: Attempt, number: int | str) -> None:
      attempts.append(attempt)
      if finding := place.finding(attempt):
        wrong.append(attempt)
        print(f"{number}: {attempt}\n  {finding}", flush=True)

    if chosen.usual:
      for line in COMMANDS:
        tried = place.give_usual(line)
        print(f"{tried.code} {tried.seconds:.1f} s {line}\n{tried.said}")
        look(Attempt(tuple(line.split())), line)
    for line in lines if chosen.disk else ():
      for room in (0, 20_000):
        look(
          Attempt(tuple(line.split()), "disk", room), f"{line}, {room} bytes"
        )
    for words, *rest in json.loads(FOUND.read_text()) if FOUND.exists() else ():
      look(Attempt(tuple(words), *rest), "found before")
    number, one = chosen.number or 0, chosen.number is not None
    while one or number < chosen.count or time.monotonic() < ends:
      rng = random.Random(f"{chosen.seed} {number}")
      look(drawn(rng, place, lines), number)
      number += 1
      if one:
        break
    place.clear()
  print(f"{len(attempts)} commands, {len(wrong)} findings")
  for attempt in wrong:
    print(json.dumps(attempt))
  sys.exit(bool(wrong))


if __name__ == "__main__":
  main()
