"""A tour of an adapter's files, every step compared with the one before.

  python -m experiments.tour            (writes docs/tour.md, docs/tour.json)

Trains VeRA briefly on all-MiniLM-L6-v2 and generated entailment pairs, then
takes it all the way round: adapter folder, predict, merge, torch, PEFT as VeRA
and as LoRA; and the other way, adapters that PEFT trained (VeRA, LoRA) into our
format and back. After each arrow the logits of the same 32 pairs are compared;
a difference past its bound ends the tour with exit code 1, and nothing is
written. About a minute on one core. Needs torch and peft beside our own
requirements: requirements-parity.txt.
"""

import contextlib
import json
import os
import platform
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from configs import quickstart
from experiments import cli
from vera_jax import results
from vera_jax.adapter_files import load_adapter, tensors
from vera_jax.checkpoint import Checkpoints
from vera_jax.classifier import Classifier, load_classifier, restore_adapter
from vera_jax.data.examples import Examples
from vera_jax.data.glue import load_split
from vera_jax.data.tasks import task_named
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.hub import resolve
from vera_jax.labels import label_tree, split
from vera_jax.merged import write_merged
from vera_jax.models.hf_weights import fingerprint, load_params
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.prediction import Predictor
from vera_jax.train.evaluate import Logits, split_logits
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.model import init_state
from vera_jax.train.run import build_run
from vera_jax.train.sharding import BATCH
from vera_jax.train.step import eval_step

ROOT = Path(__file__).resolve().parents[1]
PAIRS = {"train": 160, "dev": 32}  # the first of each split are used
ROUND = 1e-4  # a logit in float32, computed in another order
MOVED = 1e-2  # a logit, by an adapter that was trained
SAME = 0.0  # bit for bit
PEFT_BATCH = 32
NAMES = {"vera": "VeRA", "lora": "LoRA"}
RATES = {"vera": 2e-2, "lora": 5e-3}  # PEFT's
HEADER = ("step", "compared", "largest difference", "bound", "bytes written")
SIZES = ("adapter", "trained numbers", "bytes here", "bytes in PEFT")


class Step(NamedTuple):
  """An arrow of the tour. `moved` asks for a difference of at least the bound,
  where else it is the most; `written` is the size of the files it wrote."""

  arrow: str
  compared: str
  difference: float
  bound: float
  moved: bool = False
  written: int | None = None

  @property
  def passed(self) -> bool:
    if self.moved:
      return self.difference >= self.bound
    return self.difference <= self.bound

  def cells(self) -> list[str]:
    """As a row of a table."""
    size = "" if self.written is None else f"{self.written:,}"
    limit = f"{'≥' if self.moved else '≤'} {self.bound:g}"
    return [self.arrow, self.compared, f"{self.difference:.1e}", limit, size]


class Size(NamedTuple):
  """One adapter's two files, in our format and in PEFT's."""

  adapter: str
  numbers: int
  ours: int
  theirs: int

  def cells(self) -> list[str]:
    """As a row of a table."""
    return [self.adapter, *(f"{number:,}" for number in self[1:])]


class Ground(NamedTuple):
  """What the tour walks on: an empty folder, the run's config, the base, the
  pairs that are trained on and those that are compared."""

  place: Path
  config: ConfigDict
  base: Path
  train: Examples
  probes: Examples

  @property
  def run(self) -> Path:
    return self.place / "run"

  @property
  def adapter(self) -> Path:
    return self.run / "adapter"


def main() -> None:
  _need_torch()
  start = time.monotonic()
  with TemporaryDirectory() as folder:
    steps, sizes = walk(Path(folder))
  seconds = time.monotonic() - start
  _show(steps, sizes)
  check(steps)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  write_page(out / "tour.md", steps, sizes, seconds=seconds)
  facts = {"seconds": seconds, **_provenance()}
  facts |= {"steps": [step._asdict() for step in steps]}
  facts |= {"sizes": [size._asdict() for size in sizes]}
  (out / "tour.json").write_text(json.dumps(facts, indent=2) + "\n")


def _need_torch() -> None:
  for name in ("torch", "peft"):
    if find_spec(name) is None:
      raise UserError(
        f"The tour needs {name}, which is not installed:"
        " pip install -r requirements-parity.txt"
      )


def check(steps: Iterable[Step]) -> None:
  """Raises a UserError that names each step past its bound."""
  past = [step for step in steps if not step.passed]
  if past:
    told = (
      f"{s.arrow} ({s.compared}): {s.difference:.2e}, not"
      f" {'at least' if s.moved else 'at most'} {s.bound:g}"
      for s in past
    )
    raise UserError("The tour failed at\n  " + "\n  ".join(told))


def walk(place: Path) -> tuple[list[Step], list[Size]]:
  """All steps, in order, and what the adapters' files weigh."""
  ground = _ground(place)
  with _quiet():
    trained, logits = _train(ground)
    steps = [*trained, *_merge(ground, logits), *_to_peft(ground, logits)]
    for method in NAMES:
      steps += _from_peft(ground, method)
  return steps, list(_sizes(ground))


def _ground(place: Path) -> Ground:
  config = quickstart.get_config()
  source = _first_pairs(ROOT / config.data.source, place / "pairs")
  config.data.source = str(source)
  config.data.cache_dir = str(place / "tokens")
  config.model.dtype = "float32"
  config.optim.batch_size = 16
  config.optim.epochs = 2
  task = task_named(config.task)
  train, dev = (
    load_split(task, source, name) for name in ("train", "validation")
  )
  return Ground(place, config, resolve(config.model.name), train, dev)


def _first_pairs(source: Path, folder: Path) -> Path:
  folder.mkdir()
  for name, count in PAIRS.items():
    lines = (source / f"{name}.tsv").read_text().splitlines(keepends=True)
    (folder / f"{name}.tsv").write_text("".join(lines[: count + 1]))
  return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without torch's and PEFT's bars and advice."""
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield


def _train(ground: Ground) -> tuple[list[Step], Logits]:
  """Trains here; the steps so far and what the saved adapter answers."""
  result = train_and_evaluate(ground.config, ground.run)
  trained, evaluated = _end_of_training(ground, result["best"]["step"])
  saved = load_adapter(ground.adapter)
  logits = _predicted(restore_adapter(saved), ground)
  return [
    Step(
      "train → adapter folder",
      "all trained numbers: checkpoint, folder",
      _apart(tensors(trained), saved.tensors),
      SAME,
      written=_bytes(ground.adapter),
    ),
    Step(
      "adapter folder → predict",
      "logits: training's own evaluation, predict",
      _largest(evaluated, logits),
      ROUND,
    ),
  ], logits


def _end_of_training(ground: Ground, step: int) -> tuple[Any, Logits]:
  """A checkpoint's trained leaves, and its logits as training evaluates."""
  run = build_run(ground.config)
  state = init_state(run.model, run.tx, run.mesh)
  with Checkpoints(ground.run / "checkpoints") as saves:
    state, _ = saves.restore(step, state)
  logits = split_logits(
    jax.jit(partial(eval_step, apply=run.model.module.apply)),
    state.params,
    run.model.frozen,
    run.data.tokens["validation"],
    run.data.eval_layouts["validation"],
    sharding=NamedSharding(run.mesh, BATCH),
  )
  return state.params, logits


def _merge(ground: Ground, logits: Logits) -> Iterator[Step]:
  """The plain checkpoint, here and in torch, and the base that it leaves."""
  before, out = fingerprint(ground.base), ground.place / "merged"
  adapted = restore_adapter(load_adapter(ground.adapter))
  write_merged(adapted, out)
  yield Step(
    "adapter folder → merge",
    "logits: predict, merged checkpoint",
    _largest(logits, _predicted(load_classifier(out), ground)),
    ROUND,
    written=_bytes(out),
  )
  yield Step(
    "merge → torch loads it",
    "logits: predict, torch",
    _largest(logits, _torch_logits(_in_torch(out), ground)),
    ROUND,
  )
  yield Step(
    "merge → unmerge",
    "all frozen numbers and the base's file: before, after",
    _from_base(adapted) if fingerprint(ground.base) == before else np.inf,
    SAME,
  )


def _from_base(adapted: Classifier) -> float:
  """How far the frozen leaves are from the base's file."""
  labels = label_tree(adapted.params, adapted.about["method"])
  frozen = split(adapted.params, labels)[1]
  base = load_params(adapted.folder, jax.eval_shape(lambda: frozen)).params
  return max(jax.tree.leaves(jax.tree.map(_largest, frozen, base)))


def _to_peft(ground: Ground, logits: Logits) -> Iterator[Step]:
  """Our adapter in PEFT, as VeRA and as LoRA."""
  for method, name in NAMES.items():
    out = ground.place / f"exported-{method}"
    export_adapter(ground.adapter, out, method=method)
    model = _in_peft(out, ground)
    yield Step(
      f"adapter folder → PEFT export as {name} → PEFT loads it",
      "logits: predict, PEFT",
      _largest(logits, _torch_logits(model, ground)),
      ROUND,
      written=_bytes(out),
    )
    yield _moved(
      f"training moved the logits (as {name} in PEFT)", model, ground
    )


def _moved(arrow: str, model: Any, ground: Ground) -> Step:
  """That PEFT's model answers otherwise with its adapter switched off."""
  logits = _torch_logits(model, ground)
  model.base_model.disable_adapter_layers()
  bare = _torch_logits(model, ground)  # with the trained head all the same
  model.base_model.enable_adapter_layers()
  difference = _largest(logits, bare)
  return Step(arrow, "logits: adapter on, off", difference, MOVED, moved=True)


def _from_peft(ground: Ground, method: str) -> Iterator[Step]:
  """An adapter that PEFT trained, here, and as LoRA in PEFT again."""
  theirs, ours, again = (
    ground.place / f"{part}-{method}" for part in ("theirs", "ours", "again")
  )
  name, model = NAMES[method], _train_in_peft(ground, method)
  model.save_pretrained(str(theirs))
  logits = _torch_logits(model, ground)
  yield _moved(f"PEFT trains {name}", model, ground)._replace(
    written=_bytes(theirs)
  )
  import_adapter(theirs, ours, base=str(ground.base), task=ground.config.task)
  imported = restore_adapter(load_adapter(ours))
  yield Step(
    f"PEFT's {name} → import → predict",
    "logits: PEFT, predict",
    _largest(logits, _predicted(imported, ground)),
    ROUND,
    written=_bytes(ours),
  )
  export_adapter(ours, again, method="lora")
  yield Step(
    f"imported {name} → LoRA export → PEFT loads it",
    "logits: PEFT before, PEFT after",
    _largest(logits, _torch_logits(_in_peft(again, ground), ground)),
    ROUND,
    written=_bytes(again),
  )
  if method == "vera":
    model.peft_config["default"].save_projection = False
    model.save_pretrained(str(ground.place / "bare-vera"))


def _sizes(ground: Ground) -> Iterator[Size]:
  """Of the adapters that PEFT trained."""
  for theirs, ours, kind in (
    ("theirs-vera", "ours-vera", "VeRA"),
    ("bare-vera", "ours-vera", "VeRA, no projections in PEFT's file"),
    ("theirs-lora", "ours-lora", "LoRA"),
  ):
    folder = ground.place / ours
    numbers = sum(x.size for x in load_adapter(folder).tensors.values())
    yield Size(kind, numbers, _bytes(folder), _bytes(ground.place / theirs))


def _train_in_peft(ground: Ground, method: str) -> Any:
  """A new adapter and head, after a few steps of AdamW."""
  import peft
  import torch

  model = peft.get_peft_model(
    _in_torch(ground.base), _peft_config(ground.config, method)
  ).train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimiser = torch.optim.AdamW(trained, lr=RATES[method])
  labels = torch.from_numpy(np.asarray(ground.train.labels)).long()
  for start in range(0, len(labels), PEFT_BATCH):
    rows = slice(start, start + PEFT_BATCH)
    inputs = _encoded(ground.train, rows, ground)
    model(**inputs, labels=labels[rows]).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
  return model.eval()


def _peft_config(config: ConfigDict, method: str) -> Any:
  import peft

  own = config[method]
  same: dict[str, Any] = {"task_type": "SEQ_CLS"}
  same |= {"r": own.rank, "target_modules": list(own.targets)}
  if method == "lora":
    return peft.LoraConfig(lora_alpha=own.alpha, **same)
  return peft.VeraConfig(**same)


def _encoded(pairs: Examples, rows: slice, ground: Ground) -> Any:
  tokenizer = load_tokenizer(ground.base)
  texts = pairs.first[rows], (pairs.second or [])[rows]
  return tokenizer(*texts, padding=True, return_tensors="pt")


def _in_torch(folder: Path) -> Any:
  import torch
  from transformers import AutoModelForSequenceClassification as Auto

  torch.manual_seed(0)  # of a new head, and of dropout
  return Auto.from_pretrained(folder, num_labels=2).eval()


def _in_peft(folder: Path, ground: Ground) -> Any:
  import peft

  base = _in_torch(ground.base)
  return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def _torch_logits(model: Any, ground: Ground) -> Logits:
  import torch

  with torch.no_grad():
    inputs = _encoded(ground.probes, slice(None), ground)
    return model(**inputs).logits.numpy()


def _predicted(classifier: Classifier, ground: Ground) -> Logits:
  first, second = ground.probes.first, ground.probes.second
  return Predictor(classifier).logits(first, second)


def _largest(one: Any, two: Any) -> float:
  return float(np.abs(np.asarray(one) - np.asarray(two)).max())


def _apart(
  one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]
) -> float:
  if one.keys() != two.keys():
    return float("inf")
  return max(_largest(one[name], two[name]) for name in one)


def _bytes(folder: Path) -> int:
  """Of JSON and tensors; PEFT writes a model card as well."""
  files = [*folder.glob("adapter*.json"), *folder.glob("*.safetensors")]
  return sum(file.stat().st_size for file in files)


def _show(steps: Iterable[Step], sizes: Iterable[Size]) -> None:
  console = Console()
  for header, rows in ((HEADER, steps), (SIZES, sizes)):
    table = Table()
    for name in header:
      table.add_column(name)
    for row in rows:
      table.add_row(*row.cells())
    console.print(table)


PAGE = """# A tour of an adapter's files

An adapter that was trained here goes through every format that it can have,
and adapters that PEFT trained come here and go back. After each arrow the
logits of the same {pairs} pairs of sentences are compared with those before it.
A difference past its bound ends the tour with exit code 1; `make parity`,
which CI runs, takes it.

```
python -m experiments.tour
```

writes this page and `tour.json`. The model is all-MiniLM-L6-v2, the data are
generated entailment pairs, both as in the quickstart; query and value are
adapted, VeRA with r = 256, LoRA with r = 8. Training is as short as the tour
needs to move the logits: no score here says anything.

{steps}

Bounds with ≥ are of steps that must change the logits. "LoRA export" of a VeRA
adapter has VeRA's rank, 256: exact, and large. To unmerge is to keep, not to
subtract: merging returns a new tree and writes a new folder, so the base's
bytes are what they were, and `merge.json` has its name and fingerprint.

## Bytes

The same adapter, with its head, in both formats: `adapter.json` and
`adapter.safetensors` here, `adapter_config.json` and
`adapter_model.safetensors` in PEFT. "No projections" is PEFT's
`save_projection=False`: who reads that file must draw A and B as torch does.

{sizes}

A folder of ours has at most 4 bytes a trained number and 16 KiB, for any
method and depth: what consecutive layers train is one tensor in the file.

Made with {versions}; {hardware}; {seconds:.0f} seconds in all.
"""


def write_page(
  file: Path, steps: Iterable[Step], sizes: Iterable[Size], *, seconds: float
) -> None:
  """The whole page: text, both tables, what they were made with."""
  facts = _provenance()
  text = PAGE.format(
    pairs=PAIRS["dev"],
    steps=_markdown(HEADER, steps),
    sizes=_markdown(SIZES, sizes),
    versions=", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    hardware=facts["hardware"],
    seconds=seconds,
  )
  file.write_text(text, encoding="utf-8")


def _markdown(header: Sequence[str], rows: Iterable[Step | Size]) -> str:
  cells = [header, ["---"] * len(header), *(row.cells() for row in rows)]
  return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _provenance() -> dict[str, Any]:
  versions = results.provenance()["versions"]
  versions |= {name: version(name) for name in ("torch", "peft")}
  cores = len(os.sched_getaffinity(0))
  hardware = f"{cores} CPU core{'s'[: cores != 1]}, {platform.machine()}"
  return {"versions": versions, "hardware": hardware}


if __name__ == "__main__":  # flags too: a test imports this beside others
  OUT = flags.DEFINE_string("out", "docs", "Where tour.md and tour.json go.")
  cli.run(main, usage=__doc__)
