"""The memory that training takes, by how the frozen base is stored.

  python -m benchmarks.quantised
  python -m benchmarks.quantised --bases=float32,keep --remat=full

Steps of VeRA on all linear layers of SmolLM2's layers, a row of 512 tokens
each, with and without rematerialisation. Every base has a process of its own.
Writes quantised.json and quantised.md:

  linear layers  their kernels as allocated
  planned peak   what XLA sets aside for the program of a microbatch: arguments,
                 results and temporaries
  resident peak  the most memory that the process had during a step, its
                 libraries and compiled programs included

float32 and bfloat16 are types of base and computing; on codes it is float32.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.process import forget_peak, peak_bytes
from benchmarks.report import environment, load, write
from configs.e2e import SMOLLM2
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.errors import UserError
from vera_jax.files import read_json

BASES = ("float32", "bfloat16", "int8", "nf4", "keep")
REMAT = ("none", "full")
TARGETS = tuple(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))
TOKENS, STEPS = 512, 2
NAMES = {"keep": "kept codes (Q4_1)", "bfloat16": "model.dtype=bfloat16"}


def define_flags() -> None:
  flags.DEFINE_string("model", SMOLLM2, "The decoder, a GGUF file for keep.")
  flags.DEFINE_integer("rank", 256, "VeRA's rank.", lower_bound=1)
  flags.DEFINE_list("bases", list(BASES), "How the base is stored.")
  flags.DEFINE_list("remat", list(REMAT), "Values of config.model.remat.")
  flags.DEFINE_string("out", "results/benchmarks", "Where the files go.")
  flags.DEFINE_bool("add", False, "Keep the rows of others that OUT has.")
  flags.DEFINE_string("row", None, "One base and remat, as keep:full; prints.")


def main() -> None:
  options = flags.FLAGS
  if options.row:
    base, _, remat = options.row.partition(":")
    if base not in BASES or remat not in REMAT:
      raise UserError(
        f"--row is {options.row}; give one of {', '.join(BASES)} and one of"
        f" {', '.join(REMAT)}, as keep:full."
      )
    print(json.dumps(measure(options.model, options.rank, base, remat)))
    return
  unknown = {*options.bases} - {*BASES} | {*options.remat} - {*REMAT}
  if unknown:
    raise UserError(
      f"There is no {', '.join(sorted(unknown))}; bases are {', '.join(BASES)},"
      f" values of remat {', '.join(REMAT)}."
    )
  result = environment("quantised") | {
    "model": options.model,
    "rank": options.rank,
    "tokens": TOKENS,
  }
  old = Path(options.out) / "quantised.json"
  rows = []
  if options.add and old.exists():
    rows = rows_of(read_json(old), measured_with=result)
  for base in options.bases:
    for remat in options.remat:
      rows = [x for x in rows if (x["base"], x["remat"]) != (base, remat)]
      rows.append(run_row(base, remat))
      print(json.dumps(rows[-1]), flush=True)
  order = [(base, remat) for base in BASES for remat in REMAT]
  result["rows"] = sorted(
    rows, key=lambda row: order.index((row["base"], row["remat"]))
  )
  result["load_after"] = load()
  path = write("quantised", result, folder=options.out)
  page = markdown(result)
  path.with_suffix(".md").write_text(page, encoding="utf-8")
  print(f"\n{page}\n{path}")


def rows_of(
  old: Mapping[str, Any], *, measured_with: Mapping[str, Any]
) -> list[Any]:
  """The rows of a file, to which others are added.

  Raises:
    UserError: they were measured with something else; the message says what.
  """
  unequal = [
    f"{name} is {old.get(name)} there and {measured_with[name]} now"
    for name in ("model", "rank", "tokens", "cpu", "versions")
    if old.get(name) != measured_with[name]
  ]
  if unequal:
    raise UserError(
      "The rows that are there can't stand under one heading with new ones:"
      f" {'; '.join(unequal)}. Leave --add out, or name another --out."
    )
  return old["rows"]


def run_row(base: str, remat: str) -> dict[str, Any]:
  """A row, measured in another process.

  Raises:
    UserError: with the end of what that process printed, if it fails.
  """
  options = flags.FLAGS
  done = subprocess.run(
    [
      *(sys.executable, "-W", "ignore", "-m", "benchmarks.quantised"),
      *(f"--model={options.model}", f"--rank={options.rank}"),
      f"--row={base}:{remat}",
    ],
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise UserError(f"{base}:{remat} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, rank: int, base: str, remat: str) -> dict[str, Any]:
  """The bytes and the seconds of a step, in this process."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax.traverse_util import flatten_dict

  from vera_jax.adapters.vera import vera
  from vera_jax.models.decoder import HEAD
  from vera_jax.models.family import read_fields
  from vera_jax.models.folder import resolve
  from vera_jax.pretrained.blueprint import blueprint, load_model
  from vera_jax.pretrained.sharding import make_mesh
  from vera_jax.tasks.language_modelling import loss
  from vera_jax.train.compiled_step import (
    CompiledStep,
    init_state,
    state_shape,
  )
  from vera_jax.train.optim import optimiser
  from vera_jax.train.runtime import (
    return_freed_memory,
    use_compilation_cache,
  )
  from vera_jax.train.step import Frozen, outputs_of

  use_compilation_cache()
  folder = resolve(model)
  network = blueprint(
    read_fields(folder),
    outputs=0,
    head=HEAD,
    adapter=(vera(rank), TARGETS),
    dtype=jnp.dtype("bfloat16" if base == "bfloat16" else "float32"),
    scan=True,
    remat=remat,
    sizes=(1, TOKENS, TOKENS),
    quantise="none" if base.endswith(("32", "16")) else base,
  )
  mesh = make_mesh(over=jax.devices()[:1])
  loaded = load_model(network, folder, mesh=mesh, seed=0)
  kernels = flatten_dict(loaded.frozen)
  linear = sum(kernels[path].nbytes for path in network.kernels)
  rates = {"adapter_lr": 1e-2, "head_lr": 0.0, "weight_decay": 0.0}
  make: Callable[..., Any] = partial(optimiser, loaded.labels, steps=100)
  shape = state_shape(loaded, make(**rates), mesh)
  step = CompiledStep(
    shape,
    outputs=partial(outputs_of, network.module, tuple(network.inputs)),
    loss=loss,
    optimiser=make,
  )
  state = init_state(loaded.trainable, make(**rates), shape)
  frozen, key = Frozen(loaded.frozen, loaded.projections), jax.random.key(0)
  del loaded, kernels
  rng = np.random.default_rng(0)
  ids = rng.integers(
    network.config.vocab_size, size=(1, TOKENS + 1), dtype="i4"
  )
  places = np.arange(TOKENS, dtype=np.int32)[None]
  batch = {
    "input_ids": ids[:, :-1],
    "positions": places,
    "segment_ids": np.ones_like(places),
    "read_positions": places,
    "labels": ids[:, 1:],
    "weights": np.ones(places.shape, np.float32),
  }
  batch = jax.tree.map(jnp.asarray, batch)
  traced = step.trace(frozen, batch, key)
  memory: Any = traced.lower().compile().memory_analysis()
  step_rates = jax.tree.map(jnp.float32, rates)
  losses, seconds = [], []
  for number in range(STEPS):
    if number == 1:  # all is compiled
      loading_peak = peak_bytes()
      gc.collect()
      return_freed_memory()
      forget_peak()
    start = time.perf_counter()
    state, metrics = step(state, frozen, [batch], key, step_rates)
    losses.append(float(metrics["loss"]))
    seconds.append(time.perf_counter() - start)
  return {
    "base": base,
    "remat": remat,
    "linear_bytes": linear,
    "base_bytes": sum(x.nbytes for x in jax.tree.leaves(frozen.params)),
    "temporary_bytes": memory.temp_size_in_bytes,
    "planned_bytes": (
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    ),
    "resident_bytes": peak_bytes(),
    "process_bytes": max(loading_peak, peak_bytes()),
    "seconds": seconds[-1],
    "losses": losses,
  }


def markdown(result: Mapping[str, Any]) -> str:
  """The page of the figures."""
  rows: Sequence[Mapping[str, Any]] = result["rows"]
  known = {(row["base"], row["remat"]): row for row in rows}
  names = ["base", "remat", "linear layers, MB", "of float32"]
  names += ["temporaries, MB", "planned peak, MB", "of float32"]
  names += ["resident peak, MB", "of float32", "s", "loss"]
  lines = []
  for row in rows:
    plain = known.get(("float32", row["remat"]))

    def of(name: str, row=row, plain=plain) -> list[str]:
      share = f"{row[name] / plain[name]:.3f}" if plain else ""
      return [f"{row[name] / 1e6:,.1f}", share]

    lines.append(
      [
        NAMES.get(row["base"], row["base"]),
        row["remat"],
        *of("linear_bytes"),
        of("temporary_bytes")[0],
        *of("planned_bytes"),
        *of("resident_bytes"),
        f"{row['seconds']:.1f}",
        f"{row['losses'][0]:.4f}",
      ]
    )
  about = (
    f"{result['model']}, VeRA with r = {result['rank']} on all linear layers, a"
    f" row of {result['tokens']} tokens per step, layers scanned;"
    f" {result['cpu']}, {result['cores']} cores, jax"
    f" {result['versions']['jax']}. Remat: config.model.remat. Planned: what"
    " XLA sets aside for a microbatch's program. Resident: of the whole process"
    " during a step, of which one was timed. Loss: of the first step, on random"
    " tokens."
  )
  return "\n".join(
    [
      *("# Memory of training by the base's storage", "", about, ""),
      *(markdown_table(names, lines, texts=2), ""),
    ]
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
