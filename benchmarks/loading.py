"""Loading by slices: what each of several processes takes for its share.

  python -m benchmarks.loading

Writes a random checkpoint of some layers of LLaMA 7B in bfloat16, several
safetensors files and their index, and lets processes load it together onto
several meshes, plain and in codes: each reads what its one device holds. Above
what it had before, none may address more than 1.25 times its share and 100 MB,
or it fails (RLIMIT_AS). Prints each mesh's share, the bytes read, the most
memory beyond the imports and the seconds, of the process that had most.
"""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from benchmarks.report import environment, write
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.errors import UserError
from vera_jax.models.hf_weights import to_hf
from vera_jax.models.known_shapes import DECODERS
from vera_jax.pretrained.blueprint import blueprint

BASE = "huggyllama/llama-7b"
MESHES = ((1, 4, 1), (1, 2, 2), (1, 1, 4))  # data, fsdp, tensor
KINDS = ("none", "int8", "nf4")
HEADER = [
  "data × fsdp × tensor",
  "quantise",
  "MB of a share",
  "MB read",
  "MB of memory, most",
  "MB allowed",
  "seconds",
]


def define_flags() -> None:
  flags.DEFINE_integer("layers", 1, "Of the base.", 1)
  flags.DEFINE_string("scratch", None, "Where the checkpoint is written.")
  flags.DEFINE_string("out", "results/benchmarks", "Where loading.json goes.")


def main() -> None:
  options = flags.FLAGS
  about = environment("loading")
  fields = {**DECODERS[BASE], "num_hidden_layers": options.layers}
  folder = Path(tempfile.mkdtemp(dir=options.scratch))
  meshes = []
  try:
    size = write_base(folder, fields)
    for mesh, kind in itertools.product(MESHES, KINDS):
      answers = together(folder, mesh, quantise=[kind])
      loads = [answer["loads"][0] for answer in answers]
      names = ("share", "room", "peak", "read", "seconds")
      most = {name: max(load[name] for load in loads) for name in names}
      meshes.append({"mesh": mesh, "quantise": kind, **most})
      result = {**about, "base": BASE, "bytes": size, "meshes": meshes}
      print(markdown(result), flush=True)
      write("loading", result, folder=options.out)
  finally:
    shutil.rmtree(folder)


def write_base(
  folder: Path, fields: Mapping[str, Any], *, dtype: str = "bfloat16"
) -> int:
  """A random checkpoint, each layer in a file of its own; gives its bytes."""
  plan = blueprint(
    fields, head="language_modelling", outputs=0, dtype=dtype, scan=False
  )
  rng, size = np.random.default_rng(0), 0
  index: dict[str, str] = {}
  groups: dict[str, dict[Any, Any]] = {}
  for path, leaf in plan.shapes.items():
    layer = next((x for x in path if x.startswith("layer_")), "")
    groups.setdefault(layer, {})[path] = leaf
  for number, group in enumerate(groups.values(), 1):
    params = {
      path: rng.integers(-99, 100, leaf.shape, np.int8).astype(leaf.dtype)
      for path, leaf in group.items()
    }
    tensors = to_hf(unflatten_dict(params), plan.config)
    name = f"model-{number:05}-of-{len(groups):05}.safetensors"
    save_file(tensors, folder / name)
    index |= dict.fromkeys(tensors, name)
    size += sum(tensor.nbytes for tensor in tensors.values())
  text = json.dumps({"weight_map": index})
  (folder / "model.safetensors.index.json").write_text(text)
  (folder / "config.json").write_text(json.dumps(dict(fields)))
  return size


def together(
  folder: Path,
  mesh: Sequence[int],
  *,
  quantise: Sequence[str],
  dtype: str = "bfloat16",
) -> list[dict[str, Any]]:
  """What each process of a mesh, with one device each, says of its loading.

  Raises:
    UserError: one of them failed.
  """
  count = int(np.prod(mesh))
  with socket.socket() as port:
    port.bind(("localhost", 0))
    coordinator = f"localhost:{port.getsockname()[1]}"
  command = [sys.executable, "-m", "benchmarks.load_share"]
  names = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  with tempfile.TemporaryDirectory() as scratch:
    files, processes = [], []
    for number in range(count):
      files.append([Path(scratch, f"{n}{number}") for n in ("ask", "answer")])
      settings = {
        "started": time.time(),
        "coordinator": coordinator,
        "processes": count,
        "number": number,
        "folder": str(folder),
        "mesh": list(mesh),
        "quantise": list(quantise),
        "dtype": dtype,
      }
      files[-1][0].write_text(json.dumps(settings))
      started = subprocess.Popen([*command, *map(str, files[-1])], env=names)
      processes.append(started)
    codes = [process.wait() for process in processes]
    if any(codes):
      raise UserError(f"The processes ended with {codes}; see above.")
    return [json.loads(answer.read_text()) for _, answer in files]


def rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
  for load in result["meshes"]:
    names = ("share", "read", "peak", "room")
    yield [
      " × ".join(map(str, load["mesh"])),
      load["quantise"],
      *(f"{load[name] / 1e6:,.0f}" for name in names),
      f"{load['seconds']:.1f}",
    ]


def markdown(result: Mapping[str, Any]) -> str:
  """The table as it is printed."""
  return markdown_table(HEADER, rows(result))


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
