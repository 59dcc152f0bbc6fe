"""What faults are tried on: a tiny run, its processes, and what it leaves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
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


def make_encoder(folder: Path, **fields: float) -> Path:
  """A random BERT over the generated texts' words, in Hugging Face's layout."""
  from safetensors.numpy import save_file

  texts = "".join(file.read_text() for file in sorted(DATA.glob("*.tsv")))
  words = sorted(set(re.findall(r"\w+|[^\w\s]", texts.lower())))
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
  about = {**ENCODER, **fields, "vocab_size": len(words)}
  folder.mkdir(parents=True)
  save_file(random_encoder(about), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(about))
  (folder / "vocab.txt").write_text("\n".join(words) + "\n")
  return folder


def random_encoder(about: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors without a head, by Hugging Face's names; `about` is config.json."""
  import jax

  from vera_jax.models.bert import BertClassifier, BertConfig, input_shapes
  from vera_jax.models.hf_weights import to_hf

  config = BertConfig.from_dict(dict(about))
  init = BertClassifier(config, 2).init
  inputs = input_shapes(1, 8, 1)
  shapes = jax.eval_shape(init, jax.random.key(0), **inputs)["params"]
  del shapes["classifier"]
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    noise = 0.3 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
    return noise.astype(np.float32)

  return to_hf(jax.tree_util.tree_map_with_path(draw, shapes), config)


class Ended(NamedTuple):
  """A process's exit code and what it told."""

  code: int
  told: str


class Trial(NamedTuple):
  """A row of the table: `same` is None where no bits were to be compared."""

  fault: str
  tried: int
  lost: int
  same: bool | None
  seen: str


class Ground:
  """One config, on folders of its own below `folder`."""

  def __init__(
    self, folder: Path, *, epochs: int, dropout: bool = True
  ) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    self.folder, self.epochs = folder, epochs
    encoder = folder / "encoder"
    if not encoder.exists():
      make_encoder(encoder, **({} if dropout else NO_DROPOUT))
    self.settings: dict[str, Any] = {
      "model.name": encoder,
      "data.source": DATA,
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
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")
      ),
      "HF_HUB_OFFLINE": "1",
    }

  def start(
    self,
    workdir: Path,
    *flags: str,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    **settings: Any,
  ) -> subprocess.Popen[str]:
    """The command, which tells of itself in a file of its own."""
    given = {**self.settings, **settings}
    command = [sys.executable, "-m", "experiments.glue"]
    command += ["--config=configs/quickstart.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in given.items()]
    number = f"--xla_force_host_platform_device_count={devices}"
    told = self.folder / f"told-{time.monotonic_ns()}"
    with told.open("w") as output:
      process = subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={
          **self._environment,
          "XLA_FLAGS": number,
          **(environment or {}),
        },
      )
    process.args = told  # where `end` reads
    return process

  def run(self, workdir: Path, *flags: str, **how: Any) -> Ended:
    return end(self.start(workdir, *flags, **how))

  def start_several(
    self,
    workdir: Path,
    *,
    slurm: bool = False,
    count: int = 2,
    devices: int = 4,
    flags: Sequence[str] = (),
  ) -> list[subprocess.Popen[str]]:
    """Processes of one run, told of each other by flags or as SLURM does."""
    port = free_port()
    processes = []
    for number in range(count):
      own, environment = [], {}
      if slurm:
        environment = {
          "SLURM_JOB_ID": str(port),
          "JAX_COORDINATOR_PORT": str(port),
          "SLURM_STEP_NODELIST": "localhost",
          "SLURM_NTASKS": str(count),
          "SLURM_PROCID": str(number),
          "SLURM_LOCALID": str(number),
        }
      else:
        own = [f"--coordinator=localhost:{port}", f"--process_id={number}"]
        own += [f"--num_processes={count}"]
      processes.append(
        self.start(
          workdir, *own, *flags, devices=devices, environment=environment
        )
      )
    return processes


def end(process: subprocess.Popen[str]) -> Ended:
  """Wait for a process that `Ground.start` has started."""
  try:
    code = process.wait(LIMIT)
  finally:
    process.kill()
  return Ended(code, Path(str(process.args)).read_text())


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def wait_until(
  there: Callable[[], bool], process: subprocess.Popen[str]
) -> bool:
  """Whether something came about before the process ended."""
  while process.poll() is None:
    if there():
      return True
    time.sleep(0.001)
  return False


def reach(workdir: Path, step: int, process: subprocess.Popen[str]) -> bool:
  """Whether a run's figures came to a step before the process ended."""
  return wait_until(lambda: last_step(workdir) >= step, process)


def lines(workdir: Path) -> list[dict[str, Any]]:
  """The whole lines of metrics.jsonl."""
  path = workdir / "metrics.jsonl"
  found = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in found if line.endswith("\n")]


def last_step(workdir: Path) -> int:
  return max((line["step"] for line in lines(workdir)), default=0)


def saves(workdir: Path) -> list[int]:
  """The steps of the saves there are, ascending."""
  folder = workdir / "checkpoints"
  found = folder.iterdir() if folder.is_dir() else ()
  return sorted(int(path.name) for path in found if path.name.isdigit())


def kill(process: subprocess.Popen[str]) -> None:
  process.send_signal(signal.SIGKILL)
  process.wait()


def _arrays(workdir: Path) -> dict[str, bytes]:
  import jax
  import orbax.checkpoint as ocp

  place = workdir / "checkpoints" / str(saves(workdir)[-1]) / "state"
  with ocp.StandardCheckpointer() as checkpointer:
    about = checkpointer.metadata(place).item_metadata
    shapes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), about)
    leaves = checkpointer.restore(place, shapes)  # whatever devices saved it
  named = jax.tree_util.tree_leaves_with_path(leaves)
  return {
    jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
    for path, leaf in named
  }


def differing(one: Path, two: Path) -> list[str]:
  """What two finished runs don't have in common, to the last bit.

  Compared are the last save's step and arrays (trained leaves and optimiser),
  metrics.jsonl, the adapter's tensors, and the result but for its seconds.
  """
  found = []
  if saves(one)[-1] != saves(two)[-1] or _arrays(one) != _arrays(two):
    found.append("last save")
  for name in ("metrics.jsonl", "adapter/adapter.safetensors"):
    if (one / name).read_bytes() != (two / name).read_bytes():
      found.append(name)
  results = [json.loads((f / "result.json").read_text()) for f in (one, two)]
  for result in results:
    del result["seconds"]
  if results[0] != results[1]:
    found.append("result.json")
  return found
