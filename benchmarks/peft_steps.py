"""Step by step the same as PEFT: one start, one data set, two trainers.

  python -m benchmarks.peft_steps --source=GLUE_FOLDER --out=results/peft_steps
  python -m benchmarks.peft_steps --task=e2e --source=E2E_FOLDER --methods=vera

Trains VeRA (with PEFT's own projections) and LoRA on all-MiniLM-L6-v2 and
SST-2's sentences, dropout off, in float32, once here and once in PEFT, from the
same head over the same batches; with --task=e2e on SmolLM2 and E2E's rows.
Writes curves.json, or curves-e2e.json: both loss curves and how
far the trained leaves are apart. The start goes to PEFT, and PEFT's end comes
back, through the same files that users exchange. Needs torch and peft beside
our own requirements: requirements-parity.txt.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import train_e2e
from benchmarks.peft_curves import draw
from benchmarks.report import write
from configs import minilm
from experiments import cli
from experiments.plans.lowering import abstract_step
from vera_jax.adapters.files import load_adapter, save_adapter
from vera_jax.adapters.projections import PRNG
from vera_jax.data.loader import PackedData, batch_indices
from vera_jax.data.packing import Layout, pack_runs
from vera_jax.errors import UserError
from vera_jax.models.family import read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import fingerprint
from vera_jax.models.kinds import WORDS
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.pretrained.blueprint import load_model
from vera_jax.pretrained.sharding import make_mesh
from vera_jax.tasks.task import Task, task_for
from vera_jax.train.optim import rates_of, schedule
from vera_jax.train.step import Frozen

PAD_TO = 16  # lengths are rounded up to it

Batch = dict[str, np.ndarray]


class Both(NamedTuple):
  """A batch as our step takes it, and as transformers' models do."""

  ours: Batch
  theirs: Batch


class Trained(NamedTuple):
  """The loss of every step, and the folder of the end in our format."""

  losses: list[float]
  folder: Path


def define_flags() -> None:
  flags.DEFINE_string("task", "sst2", "sst2, or e2e: a decoder.")
  flags.DEFINE_string(
    "source", None, "A folder of GLUE's files, or a hub id; or E2E's folder."
  )
  flags.DEFINE_list("methods", ["vera", "lora"], "What is trained.")
  flags.DEFINE_string("out", "results/peft_steps", "Where results go.")
  flags.DEFINE_integer("steps", 100, "Training steps.", lower_bound=1)


def main() -> None:
  try:
    import matplotlib  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"The comparison needs {error.name}, which is not installed:"
      " pip install -r requirements-parity.txt"
    ) from error
  options, curves = flags.FLAGS, {}
  e2e = options.task == train_e2e.TASK
  for method in options.methods:
    config = train_e2e.get_config() if e2e else minilm.get_config(options.task)
    config.method = method
    config.vera.init = "peft"
    config.model.dtype = "float32"
    if options.source:
      config.data.source = options.source
    curve = curves[method] = compare(config, options.steps)
    apart = ", ".join(
      f"{kind} {value:.1e}"
      for kind, value in curve["relative_distance"].items()
    )
    print(
      f"{method}: {options.steps} steps, loss {curve['peft'][0]:.4f} to"
      f" {curve['peft'][-1]:.4f}; largest relative difference of the losses"
      f" {curve['largest_relative_loss_difference']:.1e}, of the trained leaves"
      f" at the end: {apart}"
    )
  name = "curves-e2e" if e2e else "curves"
  path = write(name, curves, folder=options.out).with_suffix(".png")
  draw(curves, path)
  print(path)


def compare(config: ConfigDict, steps: int) -> dict[str, Any]:
  """Train both for some steps; losses of each, and their largest distances."""
  with tempfile.TemporaryDirectory() as folder:
    temporary = Path(folder)
    if config.task == "language":
      base = train_e2e.Texts(config, temporary).base  # has no dropout
    else:
      base = without_dropout(resolve(config.model.name), temporary / "base")
      config.model.name = str(base)
    task = task_for(config)
    data = task.load(config, base)
    assert isinstance(data, PackedData)
    batches = list(_batches(data, config, steps))
    ours = train_here(config, base, task, batches, temporary)
    theirs = train_in_peft(config, base, task, batches, temporary)
    return _distances(config.method, ours, theirs)


def without_dropout(base: Path, folder: Path) -> Path:
  """The same base, dropout off in its config."""
  shutil.copytree(base, folder)
  fields = json.loads((folder / "config.json").read_text())
  off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
  off["classifier_dropout"] = 0.0
  (folder / "config.json").write_text(json.dumps({**fields, **off}))
  return folder


def _batches(
  data: PackedData, config: ConfigDict, steps: int
) -> Iterator[Both]:
  """One row per example, padded, for both sides."""
  tokens, size = data.tokens["train"], config.optim.batch_size
  for step in range(steps):
    rows = batch_indices(
      len(tokens), batch_size=size, seed=config.seed, step=step
    )
    longest = int(tokens.lengths[rows].max())
    length = -(-longest // PAD_TO) * PAD_TO
    layout = Layout((len(rows),), length, slots=1, reads=length)
    ((ours,),) = pack_runs(tokens, [rows], layout)
    theirs = {
      "input_ids": ours["input_ids"],
      "attention_mask": ours["segment_ids"],
    }
    if tokens.learned is None:
      theirs["token_type_ids"] = ours["token_type_ids"]
      theirs["labels"] = ours["labels"].ravel()
    else:  # the words that are read, -100 elsewhere
      row, read = np.nonzero(ours["weights"])
      labels = np.full(ours["input_ids"].shape, -100)
      columns = ours["read_positions"][row, read] + 1
      labels[row, columns] = ours["labels"][row, read]
      theirs["labels"] = labels
    yield Both(ours, theirs)


def train_here(
  config: ConfigDict,
  base: Path,
  task: Task,
  batches: list[Both],
  folder: Path,
) -> Trained:
  """Leaves the start in PEFT's format in place/start."""
  mesh = make_mesh(over=jax.devices()[:1])  # torch has one, too
  here = abstract_step(config, read_fields(base), mesh, steps=len(batches))
  network = here.model.blueprint
  model = load_model(network, base, mesh=mesh, seed=config.seed)
  state = jax.tree.map(jnp.zeros_like, here.state)
  state = state._replace(params=model.trainable)
  about = {
    "method": config.method,
    "base": str(base),
    "base_fingerprint": fingerprint(base),
    "labels": list(task.labels),
    "kind": task.kind,
    "projection_prng": PRNG,
    "projection_digest": model.digest,
    "settings": config[config.method].to_dict(),
  }
  save_adapter(folder / "ours-start", state.params, about=about)
  export_adapter(folder / "ours-start", folder / "start")
  frozen, losses = Frozen(model.frozen, model.projections), []
  rates = {n: jnp.float32(rate) for n, rate in rates_of(config).items()}
  for batch in batches:
    key = jax.random.key(0)
    state, metrics = here.step(state, frozen, [batch.ours], key, rates)
    losses.append(float(metrics["loss"]))
  save_adapter(folder / "ours-end", state.params, about=about)
  return Trained(losses, folder / "ours-end")


def train_in_peft(
  config: ConfigDict,
  base: Path,
  task: Task,
  batches: list[Both],
  folder: Path,
) -> Trained:
  """From place/start, by torch's AdamW at the same rates."""
  import peft
  import torch
  from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
  )

  if task.kind == WORDS:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
  else:
    plain = AutoModelForSequenceClassification.from_pretrained(
      base, num_labels=task.outputs
    )
  model = peft.PeftModel.from_pretrained(
    plain,
    folder / "start",
    is_trainable=True,
  ).eval()
  rates = rates_of(config)
  trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
  adapter = [p for n, p in trained if "modules_to_save" not in n]
  head = [p for n, p in trained if "modules_to_save" in n]
  adamw = torch.optim.AdamW(
    [
      {"params": adapter, "lr": rates["adapter_lr"]},
      {"params": head, "lr": rates["head_lr"]},
    ],
    weight_decay=0.0,
  )
  rate = schedule(1.0, steps=len(batches), warmup_ratio=0.06)
  scheduler = torch.optim.lr_scheduler.LambdaLR(
    adamw, lambda step: float(rate(step))
  )
  losses = []
  for batch in batches:
    inputs = {n: torch.from_numpy(x).long() for n, x in batch.theirs.items()}
    loss = model(**inputs).loss
    adamw.zero_grad()
    loss.backward()
    adamw.step()
    scheduler.step()
    losses.append(loss.item())
  model.save_pretrained(str(folder / "end"))
  import_adapter(folder / "end", folder / "theirs-end", base=str(base))
  return Trained(losses, folder / "theirs-end")


def _distances(method: str, ours: Trained, theirs: Trained) -> dict[str, Any]:
  """Relative distances: of each step's loss, and of all d, all b and so on."""
  one, two = (load_adapter(side.folder).tensors for side in (ours, theirs))
  kinds = {name.rpartition(".")[2] for name in one if f".{method}_" in name}
  apart = {}
  for kind in sorted(kinds):
    names = [name for name in sorted(one) if name.endswith(f".{kind}")]
    here, there = (
      np.concatenate([leaves[name].ravel() for name in names])
      for leaves in (one, two)
    )
    norm = np.linalg.norm(there)
    apart[kind] = float(np.linalg.norm(here - there) / norm)
  losses = np.array(ours.losses), np.array(theirs.losses)
  return {
    "vera_jax": ours.losses,
    "peft": theirs.losses,
    "largest_relative_loss_difference": float(
      np.max(np.abs(losses[0] - losses[1]) / losses[1])
    ),
    "relative_distance": apart,
  }


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__, torch=True)
