"""A tour of an adapter's files, every step compared with the one before.

  python -m tests.tours.run            (writes docs/tour.md, docs/tour.json)

Trains VeRA briefly on all-MiniLM-L6-v2 and generated entailment pairs, then
takes it all the way round: adapter folder, predict, merge, torch, PEFT as VeRA
and as LoRA; and the other way, adapters that PEFT trained (VeRA, LoRA) into our
format and back. After each arrow the logits of the same 32 pairs are compared;
a difference past its bound ends the tour with exit code 1, and nothing is
written. About a minute on one core. Needs torch and peft beside our own
requirements: requirements-parity.txt.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from vera_jax.train.evaluate import Logits, split_logits
from vera_jax.train.model import init_state

from experiments import cli
from tests.tours import page, reference
from tests.tours.ground import Ground, make_ground
from tests.tours.page import Size, Step
from vera_jax.adapters.files import load_adapter, tensors
from vera_jax.adapters.labels import label_tree, split
from vera_jax.errors import UserError
from vera_jax.models.export_hf import write_merged
from vera_jax.models.hf_weights import fingerprint, load_params
from vera_jax.models.pretrained import (
  Classifier,
  load_classifier,
  restore_adapter,
)
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.serve.predictor import Predictor
from vera_jax.train.checkpoint import Checkpoints
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.run import build_run
from vera_jax.train.sharding import BATCH
from vera_jax.train.step import eval_step

ROUND = 1e-4  # a logit in float32, computed in another order
MOVED = 1e-2  # a logit, by an adapter that was trained
SAME = 0.0  # bit for bit
NAMES = {"vera": "VeRA", "lora": "LoRA"}


def main() -> None:
  reference.need_torch()
  start = time.monotonic()
  with TemporaryDirectory() as folder:
    steps, sizes = walk(Path(folder))
  seconds = time.monotonic() - start
  page.show(steps, sizes)
  check(steps)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  page.write_page(out / "tour.md", steps, sizes, seconds=seconds)
  facts = {"seconds": seconds, **page.provenance()}
  facts |= {"steps": [step._asdict() for step in steps]}
  facts |= {"sizes": [size._asdict() for size in sizes]}
  (out / "tour.json").write_text(json.dumps(facts, indent=2) + "\n")


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
  ground = make_ground(place)
  with reference.quiet():
    trained, logits = _train(ground)
    steps = [*trained, *_merge(ground, logits), *_to_peft(ground, logits)]
    for method in NAMES:
      steps += _from_peft(ground, method)
  return steps, list(_sizes(ground))


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
    _largest(logits, reference.logits(reference.in_torch(out), ground)),
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
    model = reference.in_peft(out, ground)
    yield Step(
      f"adapter folder → PEFT export as {name} → PEFT loads it",
      "logits: predict, PEFT",
      _largest(logits, reference.logits(model, ground)),
      ROUND,
      written=_bytes(out),
    )
    yield _moved(
      f"training moved the logits (as {name} in PEFT)", model, ground
    )


def _moved(arrow: str, model: Any, ground: Ground) -> Step:
  """That PEFT's model answers otherwise with its adapter switched off."""
  logits = reference.logits(model, ground)
  model.base_model.disable_adapter_layers()
  bare = reference.logits(model, ground)  # with the trained head all the same
  model.base_model.enable_adapter_layers()
  difference = _largest(logits, bare)
  return Step(arrow, "logits: adapter on, off", difference, MOVED, moved=True)


def _from_peft(ground: Ground, method: str) -> Iterator[Step]:
  """An adapter that PEFT trained, here, and as LoRA in PEFT again."""
  theirs, ours, again = (
    ground.place / f"{part}-{method}" for part in ("theirs", "ours", "again")
  )
  name, model = NAMES[method], reference.train(ground, method)
  model.save_pretrained(str(theirs))
  logits = reference.logits(model, ground)
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
    _largest(
      logits, reference.logits(reference.in_peft(again, ground), ground)
    ),
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


if __name__ == "__main__":  # flags too: a test imports this beside others
  OUT = flags.DEFINE_string("out", "docs", "Where tour.md and tour.json go.")
  cli.run(main, usage=__doc__)
