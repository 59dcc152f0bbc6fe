"""Fixtures of the fault tests: a tiny run's processes and what it leaves."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.untimed import untimed_metrics, without_times
from vera_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEVICES = "--xla_force_host_platform_device_count"


def flags_but(name: str) -> list[str]:
  """XLA's flags that are set, without the one of this name."""
  flags = os.environ.get("XLA_FLAGS", "").split()
  return [flag for flag in flags if not flag.startswith(name)]


DATA = ROOT / "experiments/entailment"
ENCODER = {
  "model_type": "bert",
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 32,
  "max_position_embeddings": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LIMIT = 1800.0  # seconds that a process may take; the machine may be busy


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path | None]:
  """A disk in a folder; None where this user may not mount one."""
  disk = folder / "disk"
  disk.mkdir(exist_ok=True)
  kind = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"]
  mount = ["mount", *kind, str(disk)]
  if subprocess.run(mount, capture_output=True).returncode != 0:
    yield None
    return
  try:
    yield disk
  finally:  # lazily: a process that a failure left may still use it
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
  """Leaves no space on a disk; the file that takes it."""
  filler = disk / "filler"
  with filler.open("wb", buffering=0) as file, suppress(OSError):
    while True:
      file.write(bytes(4096))
  return filler


NO_DISK = "not tried: mounting a small disk needs root"


def random_encoder(fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Random tensors of a config.json's encoder, by Hugging Face's names."""
  from flax.traverse_util import unflatten_dict

  from vera_jax.models.hf_weights import to_hf
  from vera_jax.pretrained.blueprint import blueprint

  plan = blueprint(fields, outputs=2)
  rng = np.random.default_rng(0)
  leaves = {}
  for path, leaf in sorted(plan.shapes.items()):
    if path[0] != "classifier":
      noise = 0.3 * rng.standard_normal(leaf.shape) + (path[-1] == "scale")
      leaves[path] = noise.astype(np.float32)
  return to_hf(unflatten_dict(leaves), plan.config)


class Outcome(NamedTuple):
  """What a fault test found: a row of the table.

  Attributes:
    fault: what was done to the run.
    tried, lost: how often, and how often the run did not end as it should.
    same: whether all bits are those of a run left alone; None if not compared.
    seen: a sentence for the table.
    program, kind: the cell of the table of programs and faults, if it has one.
  """

  fault: str
  tried: int
  lost: int
  same: bool | None
  seen: str
  program: str = ""
  kind: str = ""


class Ended(NamedTuple):
  """A process's exit code and all that it printed."""

  code: int
  output: str


class Process(subprocess.Popen[str]):
  """A command that prints into a file."""

  def __init__(
    self, command: Sequence[str], *, output: Path, env: Mapping[str, str]
  ) -> None:
    self.output = output
    with output.open("w") as file:
      super().__init__(
        command,
        cwd=ROOT,
        stdout=file,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
      )

  def end(self) -> Ended:
    """Wait until it ends by itself."""
    try:
      code = self.wait(LIMIT)
    finally:
      self.kill()
    return Ended(code, self.output.read_text())

  def kill_now(self) -> None:
    """SIGKILL, and wait until it is gone."""
    self.kill()
    self.wait()


class Launcher:
  """Starts processes of one tiny config, whose workdirs are in `folder`.

  Attributes:
    name: of the program, for a table.
    module, config: what is started.
    seeds: those that train at once; none: one run.
    elsewhere: what a command begins with, so that its locks are those of
      another machine; see `start`.
  """

  name = "classifier"
  module, config = "experiments.glue", "configs/quickstart.py"
  seeds: tuple[int, ...] = ()
  elsewhere = ("unshare", "--uts", "sh", "-c", 'hostname other; exec "$@"', "-")

  def __init__(
    self, folder: Path, *, epochs: int, dropout: bool = True, **fields: Any
  ) -> None:
    """`fields` are of the encoder's config.json."""
    self.folder = folder
    encoder, data = folder / "encoder", folder / "data"
    if not encoder.exists():
      _make_encoder(encoder, **({} if dropout else NO_DROPOUT) | fields)
      shutil.copytree(DATA, data)
    self.settings: dict[str, Any] = {
      "model.name": encoder,
      "data.source": data,
      "data.max_train_examples": 40,
      "data.max_length": 64,
      "data.cache_dir": folder / "tokens",
      "optim.epochs": epochs,
      "optim.batch_size": 4,
      "optim.adapter_lr": 0.02,
      "optim.head_lr": 0.05,
      "vera.rank": 8,
      "eval_batch_size": 640,
      "log.every": 1,
    }
    self._environment = {
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "HF_HUB_OFFLINE": "1",
    }

  def start(
    self,
    workdir: str | Path,
    *flags: str,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    sweep: str | None = None,
    before: Sequence[str] = (),
    **settings: Any,
  ) -> Process:
    """Start training in a workdir; `settings` change the config.

    It is that of one run, or the base of a sweep. `before` is what the command
    begins with.
    """
    given = {**self.settings, **settings}
    module, key_of, config = self.module, "config", self.config
    if sweep:
      module, key_of, config = "experiments.sweep", "config.base", sweep
    command = [*before, sys.executable, "-m", module]
    command += [f"--config={config}", f"--workdir={workdir}"]
    command += [f"--{key_of}.{key}={value}" for key, value in given.items()]
    if self.seeds:
      command.append(f"--seeds={','.join(map(str, self.seeds))}")
    return Process(
      [*command, *flags],
      output=self.folder / f"output-{time.monotonic_ns()}",
      env={**self.environment(devices), **(environment or {})},
    )

  def environment(self, devices: int = 1) -> dict[str, str]:
    """Of a process that has so many devices."""
    # the flags that are set, but for the number of devices
    flags = " ".join([*flags_but(DEVICES), f"{DEVICES}={devices}"])
    return {**self._environment, "XLA_FLAGS": flags}

  def run(self, workdir: str | Path, *flags: str, **options: Any) -> Ended:
    """As `start`, until the process ends."""
    return self.start(workdir, *flags, **options).end()

  def start_several(
    self,
    workdir: str | Path,
    *more: str,
    slurm: bool = False,
    count: int = 2,
    devices: int = 4,
    port: int | None = None,
    ports: Mapping[int, int] | None = None,
    environment: Mapping[str, str] | None = None,
    **settings: Any,
  ) -> list[Process]:
    """Processes of one run, which find each other by flags or as in SLURM.

    `ports` are those by which some of them, by number, reach the coordinator.
    """
    port = port or free_port()
    processes = []
    for number in range(count):
      flags, variables = [], dict(environment or {})
      if slurm:
        variables |= {
          "SLURM_JOB_ID": str(port),
          "JAX_COORDINATOR_PORT": str(port),
          "SLURM_STEP_NODELIST": "localhost",
          "SLURM_NTASKS": str(count),
          "SLURM_PROCID": str(number),
          "SLURM_LOCALID": str(number),
        }
      else:
        reached = (ports or {}).get(number, port)
        flags = [f"--coordinator=localhost:{reached}"]
        flags += [f"--process_id={number}"]
        flags += [f"--num_processes={count}"]
      processes.append(
        self.start(
          workdir,
          *more,
          *flags,
          devices=devices,
          environment=variables,
          **settings,
        )
      )
    return processes

  def run_several(
    self, workdir: Path, *more: str, **options: Any
  ) -> list[Ended]:
    """As `start_several`, until all processes end."""
    processes = self.start_several(workdir, *more, **options)
    return [process.end() for process in processes]

  def runs(self, workdir: Path) -> list[Path]:
    """The folders of a workdir's runs."""
    return [workdir / f"seed{seed}" for seed in self.seeds] or [workdir]

  def differing(self, one: Path, two: Path) -> list[str]:
    """What differs between two finished workdirs, to the last bit."""
    pairs = zip(self.runs(one), self.runs(two), strict=True)
    return [what for pair in pairs for what in differing(*pair)]

  def run_alone(self) -> Path:
    """The workdir of a run that nothing happens to; others are compared to it.

    Raises:
      UserError: with the run's output, if even this one fails.
    """
    workdir = self.folder / "alone"
    ended = self.run(workdir)
    if ended.code:
      raise UserError(f"The run left alone failed:\n{ended.output}")
    return workdir


def _make_encoder(folder: Path, **fields: float) -> None:
  """A random BERT over the generated texts' words, in Hugging Face's layout."""
  from safetensors.numpy import save_file

  texts = "".join(file.read_text() for file in sorted(DATA.glob("*.tsv")))
  words = sorted(set(re.findall(r"\w+|[^\w\s]", texts.lower())))
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
  config = {**ENCODER, **fields, "vocab_size": len(words)}
  folder.mkdir(parents=True)
  save_file(random_encoder(config), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def free_port() -> int:
  """One that the system gives to no connection while a process starts."""
  while True:
    port = random.randrange(10_000, 30_000)
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
      return port


def wait_until(
  is_there: Callable[[], bool], process: Process, *, every: float = 0.001
) -> bool:
  """Whether a condition became true before the process ended."""
  while process.poll() is None:
    if is_there():
      return True
    time.sleep(every)
  return False


def reach(workdir: Path, step: int, process: Process) -> bool:
  """Whether a run's metrics came to a step before the process ended."""
  return wait_until(lambda: last_step(workdir) >= step, process)


def lines(workdir: Path) -> list[dict[str, Any]]:
  """The whole lines of metrics.jsonl."""
  path = workdir / "metrics.jsonl"
  found = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in found if line.endswith("\n")]


def last_step(workdir: Path) -> int:
  return max((line["step"] for line in lines(workdir)), default=0)


def saves(workdir: Path) -> list[int]:
  """The steps of the saves that are there, ascending."""
  folder = workdir / "checkpoints"
  found = folder.iterdir() if folder.is_dir() else ()
  return sorted(int(path.name) for path in found if path.name.isdigit())


def _arrays(workdir: Path) -> dict[str, bytes]:
  """The newest save's arrays: trained leaves and optimiser slots, by path."""
  import jax
  import orbax.checkpoint as ocp

  place = workdir / "checkpoints" / str(saves(workdir)[-1]) / "state"
  with ocp.StandardCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(place).item_metadata
    # as host arrays, whatever devices saved them
    shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metadata)
    leaves = checkpointer.restore(place, shapes)
  named = jax.tree_util.tree_leaves_with_path(leaves)
  return {
    jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
    for path, leaf in named
  }


def differing(one: Path, two: Path) -> list[str]:
  """What differs between two finished runs, to the last bit.

  Compared are the last save's step and arrays (trained leaves and optimiser),
  metrics.jsonl, the adapter's tensors, and the result; times are left out.
  """
  found = []
  if saves(one)[-1] != saves(two)[-1] or _arrays(one) != _arrays(two):
    found.append("last save")
  if untimed_metrics(one) != untimed_metrics(two):
    found.append("metrics.jsonl")
  name = "adapter/adapter.safetensors"
  if (one / name).read_bytes() != (two / name).read_bytes():
    found.append(name)
  results = [json.loads((f / "result.json").read_text()) for f in (one, two)]
  if len({json.dumps(without_times(result)) for result in results}) > 1:
    found.append("result.json")
  return found
