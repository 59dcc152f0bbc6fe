"""Round trips of an adapter's files, each step compared with the one before.

  python -m tests.tours.run            (writes docs/tour.md, docs/tour.json)

Trains VeRA briefly on all-MiniLM-L6-v2 and generated entailment pairs, then
takes it through all formats: adapter folder, predict, merge, torch, PEFT as
VeRA and as LoRA; and the other way, an adapter that PEFT trained, of every
method that both have, into our format and back. After each arrow the logits of
the same 32 pairs are compared. Two tiny decoders follow (`decoders.py`), which
have GGUF files as well, and whose texts are compared too. A difference past its
bound ends the tour with exit code 1, and nothing is written. About two minutes
on one core. Needs torch, PEFT and llama.cpp beside our own requirements:
requirements-parity.txt.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from tests.tours import page, reference
from tests.tours.decoders import DECODERS, decoder_trips
from tests.tours.fixtures import Fixtures, make_fixtures
from tests.tours.measures import (
  MOVED,
  NAMES,
  ROUND,
  SAME,
  files_size,
  largest,
  trained_and_saved,
)
from tests.tours.page import Size, Step
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.labels import label_tree, split
from vera_jax.errors import UserError
from vera_jax.export.hf import write_merged
from vera_jax.files import write_json
from vera_jax.models.hf_weights import fingerprint, load_params
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.peft_io.forms import HELD_BY
from vera_jax.pretrained.classifier import (
  Classifier,
  load_classifier,
  restore_adapter,
)
from vera_jax.serve.predictor import Predictor
from vera_jax.train.loop import train_and_evaluate


def main() -> None:
  reference.need_torch()
  start = time.monotonic()
  with TemporaryDirectory() as folder:
    fixtures = make_fixtures(Path(folder))
    with reference.quiet():
      steps = list(round_trips(fixtures))
      decoders = {}
      for kind, name in DECODERS.items():
        place = Path(folder) / kind
        place.mkdir()
        decoders[name] = list(decoder_trips(place, kind))
    sizes = list(file_sizes(fixtures))
  seconds = time.monotonic() - start
  page.show(steps, decoders, sizes)
  check([*steps, *chain.from_iterable(decoders.values())])
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  page.write_page(out / "tour.md", steps, decoders, sizes, seconds=seconds)
  facts = {
    "seconds": seconds,
    **page.provenance(),
    "steps": [step._asdict() for step in steps],
    "decoders": {
      name: [step._asdict() for step in trips]
      for name, trips in decoders.items()
    },
    "sizes": [size._asdict() for size in sizes],
  }
  write_json(out / "tour.json", facts)


def check(steps: Iterable[Step]) -> None:
  """Raises a UserError that names each step past its bound."""
  past = [
    f"{s.arrow} ({s.compared}): {s.difference:.2e}, to be"
    f" {'at least' if s.moved else 'at most'} {s.bound:g}"
    + (f"; {s.texts.same} of {s.texts.all} texts are equal" if s.texts else "")
    for s in steps
    if not s.passed
  ]
  if past:
    raise UserError("The tour failed at\n  " + "\n  ".join(past))


def round_trips(fixtures: Fixtures) -> Iterator[Step]:
  """All steps, in order: from our training to PEFT, from PEFT's and back."""
  run = fixtures.folder / "run"
  result = train_and_evaluate(fixtures.config, run)
  adapter = run / "adapter"
  adapted = restore_adapter(load_adapter(adapter))
  logits = predicted(adapted, fixtures)

  # The best epoch's checkpoint, evaluated as training does it.
  step = result["best"]["step"]
  setup, trained, compared = trained_and_saved(fixtures.config, run, step=step)
  yield compared
  measure_batch = setup.measure_with(trained)
  evaluated = setup.data.measured("validation", measure_batch)
  yield Step(
    "adapter folder → predict",
    "logits: training's own evaluation, predict",
    largest(evaluated, logits),
    ROUND,
  )

  before, merged = fingerprint(fixtures.base), fixtures.folder / "merged"
  write_merged(adapted, merged)
  yield Step(
    "adapter folder → merge",
    "logits: predict, merged checkpoint",
    largest(logits, predicted(load_classifier(merged), fixtures)),
    ROUND,
    written=files_size(merged),
  )
  in_torch = reference.in_torch(merged)
  yield Step(
    "merge → torch loads it",
    "logits: predict, torch",
    largest(logits, reference.logits(in_torch, fixtures)),
    ROUND,
  )
  labels = label_tree(adapted.params, adapted.adapter)
  frozen = split(adapted.params, labels)[1]
  base = load_params(fixtures.base, jax.eval_shape(lambda: frozen)).params
  differences = jax.tree.leaves(jax.tree.map(largest, frozen, base))
  unchanged = fingerprint(fixtures.base) == before
  yield Step(
    "merge → unmerge",
    "all frozen numbers and the base's file: before, after",
    max(differences) if unchanged else float("inf"),
    SAME,
  )

  for method in HELD_BY["vera"]:
    name = NAMES[method]
    out = fixtures.folder / f"exported-{method}"
    export_adapter(adapter, out, method=method)
    model = reference.in_peft(out, fixtures)
    yield Step(
      f"adapter folder → PEFT export as {name} → PEFT loads it",
      "logits: predict, PEFT",
      largest(logits, reference.logits(model, fixtures)),
      ROUND,
      written=files_size(out),
    )
    arrow = f"training moved the logits (as {name} in PEFT)"
    yield on_and_off(arrow, model, fixtures)
  for method in NAMES:
    yield from from_peft(fixtures, method)


def from_peft(fixtures: Fixtures, method: str) -> Iterator[Step]:
  """An adapter that PEFT trained, here, and in PEFT again, VeRA as LoRA."""
  theirs, ours, again = (
    fixtures.folder / f"{part}-{method}" for part in ("theirs", "ours", "again")
  )
  name, model = NAMES[method], reference.train(fixtures, method)
  model.save_pretrained(str(theirs))
  logits = reference.logits(model, fixtures)
  trained = on_and_off(f"PEFT trains {name}", model, fixtures)
  yield trained._replace(written=files_size(theirs))
  task, base = fixtures.config.task, str(fixtures.base)
  import_adapter(theirs, ours, base=base, task=task)
  imported = restore_adapter(load_adapter(ours))
  yield Step(
    f"PEFT's {name} → import → predict",
    "logits: PEFT, predict",
    largest(logits, predicted(imported, fixtures)),
    ROUND,
    written=files_size(ours),
  )
  form = HELD_BY[method][0] if method != "vera" else "lora"
  export_adapter(ours, again, method=form)
  exported = reference.in_peft(again, fixtures)
  yield Step(
    f"imported {name} → {NAMES[form]} export → PEFT loads it",
    "logits: PEFT before, PEFT after",
    largest(logits, reference.logits(exported, fixtures)),
    ROUND,
    written=files_size(again),
  )
  if method == "vera":
    model.peft_config["default"].save_projection = False
    model.save_pretrained(str(fixtures.folder / "bare-vera"))


def on_and_off(arrow: str, model: Any, fixtures: Fixtures) -> Step:
  """That PEFT's model answers differently with its adapter switched off."""
  logits = reference.logits(model, fixtures)
  model.base_model.disable_adapter_layers()
  bare = reference.logits(model, fixtures)  # still with the trained head
  model.base_model.enable_adapter_layers()
  difference = largest(logits, bare)
  return Step(arrow, "logits: adapter on, off", difference, MOVED, moved=True)


def file_sizes(fixtures: Fixtures) -> Iterator[Size]:
  """Of the adapters that PEFT trained."""
  for theirs, ours, kind in (
    ("theirs-vera", "ours-vera", "VeRA"),
    ("bare-vera", "ours-vera", "VeRA, no projections in PEFT's file"),
    ("theirs-lora", "ours-lora", "LoRA"),
  ):
    folder = fixtures.folder / ours
    numbers = sum(x.size for x in load_adapter(folder).tensors.values())
    in_peft = files_size(fixtures.folder / theirs)
    yield Size(kind, numbers, files_size(folder), in_peft)


def predicted(classifier: Classifier, fixtures: Fixtures) -> np.ndarray:
  first, second = fixtures.probes.first, fixtures.probes.second
  return Predictor(classifier).logits(first, second)


if __name__ == "__main__":  # the flag too, since a test imports this module
  OUT = flags.DEFINE_string("out", "docs", "Where tour.md and tour.json go.")
  cli.run(main, usage=__doc__, torch=True)
