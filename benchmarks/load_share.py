"""One process of `benchmarks.loading`: its share of a base, under a limit."""

import resource
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from benchmarks.process import forget_peak, peak_bytes, serve
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params
from vera_jax.models.safetensors_file import bounds
from vera_jax.operations.quantised import NONE, abstract_kernel, codes_digest
from vera_jax.pretrained.blueprint import Blueprint, blueprint
from vera_jax.pretrained.sharding import leaf_sharding, make_mesh
from vera_jax.train.distributed import initialize

ROOM = 1.25, 100e6  # how many times the share, and bytes beyond it


def load(settings: dict[str, Any]) -> dict[str, Any]:
  """Loads `folder` once for each of `quantise`."""
  imported = time.time()
  initialize(settings["coordinator"], settings["processes"], settings["number"])
  mesh = make_mesh(*settings["mesh"])
  # every run compiles: what that takes once is none of loading
  multihost_utils.process_allgather(np.zeros(1))
  return {
    "imported": imported,
    "loads": [
      load_once(Path(settings["folder"]), mesh, kind, settings["dtype"])
      for kind in settings["quantise"]
    ],
  }


def load_once(
  folder: Path, mesh: Mesh, kind: str, dtype: str
) -> dict[str, Any]:
  """Bytes of the share, of what was read, and of the most memory; seconds."""
  plan = blueprint(
    read_fields(folder),
    head="language_modelling",
    outputs=0,
    dtype=dtype,
    quantise=kind,
  )
  place = partial(leaf_sharding, mesh=mesh, rules=plan.family.rules)
  share = share_of(plan, place)
  room = int(ROOM[0] * share + ROOM[1])
  forget_peak()
  before, read = peak_bytes(), _number("io", "rchar")
  limits = resource.getrlimit(resource.RLIMIT_AS)
  most = _number("status", "VmSize") * 1024 + room
  resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
  start = time.perf_counter()
  params = load_params(
    folder,
    unflatten_dict(plan.shapes),
    quantise=kind,
    kernels=plan.kernels,
    place=place,
  ).params
  jax.block_until_ready(params)
  seconds = time.perf_counter() - start
  resource.setrlimit(resource.RLIMIT_AS, limits)
  return {
    "quantise": kind,
    "seconds": seconds,
    "share": share,
    "room": room,
    "peak": peak_bytes() - before,
    "read": _number("io", "rchar") - read,
    "codes": codes_digest(params),
    "checksums": checksums(params),
  }


def share_of(plan: Blueprint, place: Any) -> int:
  """The bytes that this process's devices hold."""
  total = 0
  for path, leaf in plan.shapes.items():
    stored = leaf
    if plan.quantise != NONE and path in plan.kernels:
      stored = abstract_kernel(leaf, plan.quantise)
    for part in jax.tree.leaves(stored):
      shape = place(path, part.shape).shard_shape(part.shape)
      total += int(np.prod(shape)) * part.dtype.itemsize
  return total


def checksums(params: Any) -> dict[str, int]:
  """Of each slice that this process has, by its leaf, part and place."""
  made = {}
  for path, leaf in flatten_dict(params).items():
    for number, part in enumerate(jax.tree.leaves(leaf)):
      for shard in part.addressable_shards:
        where = bounds(shard.index, part.shape)
        data = np.asarray(shard.data).tobytes()
        made[f"{'/'.join(path)} {number} {where}"] = zlib.crc32(data)
  return made


def _number(file: str, name: str) -> int:
  """A number of this process as Linux has it."""
  lines = Path(f"/proc/self/{file}").read_text().splitlines()
  return int(next(x for x in lines if x.startswith(name)).split()[1])


if __name__ == "__main__":
  serve(load)
