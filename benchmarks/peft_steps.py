"""Step by step the same as PEFT: one start, one data, two trainers.

  python -m benchmarks.peft_steps --source=GLUE_FOLDER --out=results/peft_steps

Trains VeRA (PEFT's own projections) and LoRA on all-MiniLM-L6-v2 and SST-2's
sentences, dropout off, in float32, once here and once in PEFT, from the same
head over the same batches, and writes curves.json: both loss curves and how far
the trained leaves are apart. The start goes to PEFT, and PEFT's end comes back,
through the same files that users exchange. Needs torch and peft beside our own
requirements: requirements-parity.txt.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import minilm
from experiments import cli
from vera_jax.errors import UserError

PAD_TO = 16  # lengths are rounded up to it

Batch = dict[str, np.ndarray]


class Trained(NamedTuple):
  """The loss of every step, and the folder of the end in our format."""

  losses: list[float]
  folder: Path


def main() -> None:
  _need_torch()
  curves = {}
  for method in ("vera", "lora"):
    config = minilm.get_config("sst2")
    config.method = method
    config.vera.init = "peft"
    config.model.dtype = "float32"
    if SOURCE.value:
      config.data.source = SOURCE.value
    curves[method] = compare(config, STEPS.value)
    print(f"{method}: {_told(curves[method])}")
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  (out / "curves.json").write_text(json.dumps(curves, indent=2) + "\n")
  _draw(curves, out / "curves.png")
  print(out / "curves.png")


def _draw(curves: dict[str, dict[str, Any]], path: Path) -> None:
  """Both loss curves of each method, one on the other."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 3.6), layout="constrained")
  axes = figure.subplots(1, len(curves), sharey=True)
  for axis, (method, curve) in zip(axes, curves.items(), strict=True):
    axis.plot(curve["peft"], color="#9ecae1", linewidth=5, label="PEFT (torch)")
    axis.plot(curve["vera_jax"], color="black", linewidth=1.2, label="vera_jax")
    apart = curve["largest_relative_loss_difference"]
    axis.set_title(f"{method}: largest relative difference {apart:.1e}")
    axis.set_xlabel("step")
    axis.legend(loc="lower left")
  axes[0].set_ylabel("training loss")
  figure.savefig(path, dpi=120)


def _need_torch() -> None:
  try:
    import matplotlib  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"The comparison needs {error.name}, which is not installed:"
      " pip install -r requirements-parity.txt"
    ) from error


def compare(config: ConfigDict, steps: int) -> dict[str, Any]:
  """Train both for some steps; losses of each, and their largest distances."""
  from vera_jax.train.data import build_data

  from vera_jax.hub import resolve

  with tempfile.TemporaryDirectory() as folder:
    place = Path(folder)
    base = without_dropout(resolve(config.model.name), place / "base")
    config.model.name = str(base)
    data = build_data(config, folder=base, shards=1)
    batches = list(_batches(data, config, steps))
    labels = list(data.task.labels)
    ours = train_here(config, base, labels, batches, place)
    theirs = train_in_peft(config, base, labels, batches, place)
    return _distances(config.method, ours, theirs)


def without_dropout(base: Path, folder: Path) -> Path:
  """The same base, dropout off in its config."""
  shutil.copytree(base, folder)
  fields = json.loads((folder / "config.json").read_text())
  off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
  off["classifier_dropout"] = 0.0
  (folder / "config.json").write_text(json.dumps({**fields, **off}))
  return folder


def _batches(data: Any, config: ConfigDict, steps: int) -> Iterable[Batch]:
  """A row an example, padded: what both sides read."""
  from vera_jax.data.loader import batch_indices

  tokens, size = data.tokens["train"], config.optim.batch_size
  for step in range(steps):
    rows = batch_indices(
      len(tokens), batch_size=size, seed=config.seed, step=step
    )
    longest = int(tokens.lengths[rows].max())
    shape = (len(rows), -(-longest // PAD_TO) * PAD_TO)
    ids = np.full(shape, tokens.pad_id, np.int32)
    mask = np.zeros(shape, np.int32)
    for row, example in enumerate(rows):
      first, last = tokens.offsets[example : example + 2]
      ids[row, : last - first] = tokens.ids[first:last]
      mask[row, : last - first] = 1
    yield {"ids": ids, "mask": mask, "labels": tokens.labels[rows]}


def train_here(
  config: ConfigDict,
  base: Path,
  labels: list[str],
  batches: list[Batch],
  place: Path,
) -> Trained:
  """Leaves the start in PEFT's format in place/start."""
  import jax
  from vera_jax.train.model import build_model, init_state

  from vera_jax.adapters.files import save_adapter
  from vera_jax.adapters.projections import PRNG
  from vera_jax.models.hf_weights import fingerprint
  from vera_jax.peft_io import export_adapter
  from vera_jax.train.optim import optimiser
  from vera_jax.train.run import learning_rates
  from vera_jax.train.sharding import make_mesh
  from vera_jax.train.step import jit_train_step

  mesh = make_mesh(over=jax.devices()[:1])  # torch has one, too
  model = build_model(config, folder=base, num_labels=len(labels), mesh=mesh)
  tx = optimiser(model.labels, **learning_rates(config), steps=len(batches))
  state = init_state(model, tx, mesh)
  about = {
    "method": config.method,
    "base": str(base),
    "base_fingerprint": fingerprint(base),
    "labels": labels,
    "projection_prng": PRNG,
    "projection_digest": model.digest,
    "settings": config[config.method].to_dict(),
  }
  save_adapter(place / "ours-start", state.params, about=about)
  export_adapter(place / "ours-start", place / "start")
  step = jit_train_step(state, apply=model.module.apply, tx=tx)
  losses = []
  for batch in batches:
    state, metrics = step(
      state, model.frozen, (_packed(batch),), jax.random.key(0)
    )
    losses.append(float(metrics["loss"]))
  save_adapter(place / "ours-end", state.params, about=about)
  return Trained(losses, place / "ours-end")


def _packed(batch: Batch) -> Batch:
  rows, length = batch["ids"].shape
  return {
    "input_ids": batch["ids"],
    "token_type_ids": np.zeros_like(batch["ids"]),
    "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    "segment_ids": batch["mask"],
    "cls_positions": np.zeros((rows, 1), np.int32),
    "labels": batch["labels"][:, None],
    "weights": np.full((rows, 1), 1 / rows, np.float32),
  }


def train_in_peft(
  config: ConfigDict,
  base: Path,
  labels: list[str],
  batches: list[Batch],
  place: Path,
) -> Trained:
  """From place/start, by torch's AdamW at the same rates."""
  import peft
  import torch
  from transformers import AutoModelForSequenceClassification

  from vera_jax.peft_io import import_adapter
  from vera_jax.train.optim import schedule
  from vera_jax.train.run import learning_rates

  model = peft.PeftModel.from_pretrained(
    AutoModelForSequenceClassification.from_pretrained(
      base, num_labels=len(labels)
    ),
    place / "start",
    is_trainable=True,
  ).eval()
  rates = learning_rates(config)
  trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
  groups: Mapping[str, list] = {
    "adapter_lr": [p for n, p in trained if "modules_to_save" not in n],
    "head_lr": [p for n, p in trained if "modules_to_save" in n],
  }
  optimiser = torch.optim.AdamW(
    [{"params": groups[name], "lr": rates[name]} for name in groups],
    weight_decay=0.0,
  )
  rate = schedule(1.0, steps=len(batches), warmup_ratio=0.06)
  scheduler = torch.optim.lr_scheduler.LambdaLR(
    optimiser, lambda step: float(rate(step))
  )
  losses = []
  for batch in batches:
    loss = model(
      input_ids=torch.from_numpy(batch["ids"]).long(),
      attention_mask=torch.from_numpy(batch["mask"]),
      labels=torch.from_numpy(batch["labels"]).long(),
    ).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    scheduler.step()
    losses.append(loss.item())
  model.save_pretrained(str(place / "end"))
  import_adapter(place / "end", place / "theirs-end", base=str(base))
  return Trained(losses, place / "theirs-end")


def _distances(method: str, ours: Trained, theirs: Trained) -> dict[str, Any]:
  """Relative distances: of each step's loss, and of all d, all b and so on."""
  from vera_jax.adapters.files import load_adapter

  one, two = (load_adapter(side.folder).tensors for side in (ours, theirs))
  kinds = {name.rpartition(".")[2] for name in one if f".{method}_" in name}
  apart = {
    kind: _relative(
      *(
        np.concatenate(
          [leaves[n].ravel() for n in sorted(one) if n.endswith(f".{kind}")]
        )
        for leaves in (one, two)
      )
    )
    for kind in sorted(kinds)
  }
  losses = np.array(ours.losses), np.array(theirs.losses)
  return {
    "vera_jax": ours.losses,
    "peft": theirs.losses,
    "largest_relative_loss_difference": float(
      np.max(np.abs(losses[0] - losses[1]) / losses[1])
    ),
    "relative_distance": apart,
  }


def _relative(one: np.ndarray, two: np.ndarray) -> float:
  return float(np.linalg.norm(one - two) / np.linalg.norm(two))


def _told(result: dict[str, Any]) -> str:
  apart = ", ".join(
    f"{kind} {value:.1e}" for kind, value in result["relative_distance"].items()
  )
  return (
    f"{len(result['peft'])} steps, loss {result['peft'][0]:.4f} to"
    f" {result['peft'][-1]:.4f}; largest relative difference of the losses"
    f" {result['largest_relative_loss_difference']:.1e}, of the end's leaves:"
    f" {apart}"
  )


if __name__ == "__main__":  # flags too: a test imports this beside others
  SOURCE = flags.DEFINE_string(
    "source", None, "SST-2: a folder of GLUE's files, or a hub id."
  )
  OUT = flags.DEFINE_string("out", "results/peft_steps", "Where results go.")
  STEPS = flags.DEFINE_integer("steps", 100, "Training steps.", lower_bound=1)
  cli.run(main, usage=__doc__)
