"""Many adapters in one batch, against one pass per adapter and against PEFT.

  python -m benchmarks.bank
  python -m benchmarks.bank --task=sst2 --source=GLUE_FOLDER

N VeRA adapters on all-MiniLM-L6-v2, each with values of its own, answer the
same texts, each text by one of them: in mixed batches from one bank, in N
passes of one adapter each, all by one adapter in ordinary batches, and in
PEFT's torch, which sets one adapter after another. The time is from texts to
logits, so tokenising counts everywhere: the median of the repetitions, which
take turns.

The logits of bank, passes and PEFT are compared. Then the adapters of 10,000
RoBERTa-base models are allocated to count their bytes, and some are replaced.
PEFT's rows need torch and peft: requirements-parity.txt.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Column, Table

from benchmarks.report import environment, interleaved, write
from configs import minilm
from experiments import cli
from vera_jax.adapters.counting import leaf_shapes
from vera_jax.adapters.files import load_adapter, save_adapter
from vera_jax.adapters.labels import join, label_tree, split
from vera_jax.adapters.projections import PRNG, digest, make_projections
from vera_jax.adapters.vera import vera
from vera_jax.data.examples import subset
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.models.family import read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import fingerprint
from vera_jax.models.paper_sizes import SIZES, roberta
from vera_jax.peft_io import export_adapter
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.predictor import Predictor
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.glue_facts import glue_task
from vera_jax.train.multi_adapter import empty_stack, set_slot

BANK, PASSES, SINGLE = "bank, mixed", "one pass per adapter", "one for all"
PEFT, PEFT_SINGLE = "PEFT, switching", "PEFT, one for all"
Variant = Callable[[], np.ndarray]  # answers all texts, gives their logits


class Texts(NamedTuple):
  """What is answered: texts, or pairs, and which adapter answers each."""

  first: list[str]
  second: list[str] | None
  adapters: list[str]

  def of(self, name: str) -> tuple[list[int], list[str], list[str] | None]:
    """The places of an adapter's texts, and those texts."""
    mine = [i for i, owner in enumerate(self.adapters) if owner == name]
    pairs = self.second and [self.second[i] for i in mine]
    return mine, [self.first[i] for i in mine], pairs


def define_flags() -> None:
  flags.DEFINE_integer("adapters", 16, "N.", lower_bound=1)
  flags.DEFINE_integer("examples", 256, "Texts in all.", lower_bound=1)
  flags.DEFINE_integer("rank", 256, "VeRA's rank.", lower_bound=1)
  flags.DEFINE_integer("repetitions", 5, "Timed runs.", lower_bound=1)
  flags.DEFINE_integer("batch", 32, "Texts per batch in PEFT.", lower_bound=1)
  flags.DEFINE_integer(
    "stack", 10_000, "RoBERTa-base adapters to allocate; 0 for none."
  )
  flags.DEFINE_string(
    "task", "generated_entailment", "Whose development texts are answered."
  )
  flags.DEFINE_string("source", "experiments", "A folder of GLUE's files.")
  flags.DEFINE_string("base", minilm.ENCODER, "The encoder.")
  flags.DEFINE_string("out", "results/benchmarks", "Where bank.json goes.")


def main() -> None:
  options = flags.FLAGS
  result = environment("bank")
  result |= measure(
    options.base,
    task=options.task,
    source=options.source,
    adapters=options.adapters,
    examples=options.examples,
    rank=options.rank,
    repetitions=options.repetitions,
    batch=options.batch,
  )
  if options.stack:
    result["roberta_base"] = allocate(options.stack, rank=1024)
  show(result)
  print(write("bank", result, folder=options.out))


def measure(
  base: str,
  *,
  task: str,
  source: str,
  adapters: int,
  examples: int,
  rank: int,
  repetitions: int,
  batch: int,
) -> dict[str, Any]:
  """Every variant's seconds, and how far its logits are from the bank's.

  Args:
    base: the encoder's folder or hub id.
    task, source: of GLUE, whose first development split gives the texts.
    adapters: how many there are; the texts are dealt to them by turns.
    examples: texts at most.
    rank: VeRA's.
    repetitions: of each variant.
    batch: texts per batch in PEFT.
  """
  with tempfile.TemporaryDirectory() as temporary:
    names = [f"adapter{i}" for i in range(adapters)]
    folders = {name: Path(temporary) / name for name in names}
    make_adapters(folders, base=base, task=task, rank=rank)
    glue = glue_task(task)
    some = load_split(glue, source, glue.dev_splits[0])
    some = subset(some, min(examples, len(some)), 0)
    dealt = [names[i % adapters] for i in range(len(some))]
    texts = Texts(some.first, some.second, dealt)
    bank = AdapterBank(folders)
    variants: dict[str, Variant] = {
      BANK: partial(bank.logits, *texts[:2], adapters=dealt)
    }
    variants |= predictor_variants(folders, texts)
    if find_spec("torch") and find_spec("peft"):
      variants |= peft_variants(folders, texts, base=resolve(base), batch=batch)
    logits = {name: run() for name, run in variants.items()}  # compiles, too
    seconds = interleaved(variants, repetitions=repetitions)
  apart = {
    name: float(np.abs(some - logits[BANK]).max())
    for name, some in logits.items()
  }
  return {
    "base": base,
    "task": task,
    "adapters": adapters,
    "rank": rank,
    "examples": len(texts.first),
    "bytes_of_the_bank": bank.nbytes,
    # what a text answered by another's adapter would look like
    "logits_apart_between_adapters": apart[SINGLE],
    "ways": {
      name: {
        "examples_per_second": len(texts.first) / statistics.median(times),
        "seconds": times,
        # None where other adapters answer
        "largest_logit_difference": (
          apart[name] if name in (PASSES, PEFT) else None
        ),
      }
      for name, times in seconds.items()
    },
  }


def make_adapters(
  folders: Mapping[str, Path], *, base: str, task: str, rank: int
) -> None:
  """Saved adapters, whose values are drawn around where training starts."""
  settings = {**minilm.get_config().vera.to_dict(), "rank": rank}
  # PEFT makes its own matrices from the seed, and these are equal to them.
  settings["init"] = "peft"
  labels, folder = glue_task(task).labels, resolve(base)
  network = blueprint(
    read_fields(folder),
    outputs=len(labels) or 1,
    method="vera",
    settings=settings,
  )
  first = jax.eval_shape(
    network.module.init, jax.random.key(0), **network.inputs
  )
  trained, _ = split(first["params"], network.label(first["params"]))
  names = ("rank", "init", "sharing")
  projections = make_projections(
    network.targets,
    seed=settings["projection_seed"],
    **{name: settings[name] for name in names},
  )
  about = {
    "task": task,
    "method": "vera",
    "settings": settings,
    "base": base,
    "base_fingerprint": fingerprint(folder),
    "labels": list(labels),
    "projection_prng": PRNG,
    "projection_digest": digest(projections),
    "max_length": 128,
  }
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    start = settings["d_init"] if path[-1].key == "vera_d" else 0.0
    return rng.normal(start, 0.05, leaf.shape).astype(np.float32)

  for folder in folders.values():
    leaves = jax.tree_util.tree_map_with_path(draw, trained)
    save_adapter(folder, leaves, about=about)


def predictor_variants(
  folders: Mapping[str, Path], texts: Texts
) -> dict[str, Variant]:
  """One compiled program that runs with one adapter after another."""
  restored = {
    name: restore_adapter(load_adapter(folder))
    for name, folder in folders.items()
  }
  first = next(iter(restored.values()))
  labels = label_tree(first.params, "vera")
  _, base = split(first.params, labels)
  # All of them share one base in memory.
  classifiers = {
    name: classifier._replace(
      params=join(split(classifier.params, labels)[0], base)
    )
    for name, classifier in restored.items()
  }
  predictor = Predictor(first)

  def passes() -> np.ndarray:
    out = np.empty((len(texts.first), first.outputs), np.float32)
    for name, predictor.classifier in classifiers.items():
      mine, some, others = texts.of(name)
      out[mine] = predictor.logits(some, others)
    return out

  def single() -> np.ndarray:
    predictor.classifier = first
    return predictor.logits(*texts[:2])

  return {PASSES: passes, SINGLE: single}


def peft_variants(
  folders: Mapping[str, Path], texts: Texts, *, base: Path, batch: int
) -> dict[str, Variant]:
  """PEFT's torch on padded batches, with the same adapters, exported."""
  import torch
  from peft import PeftModel
  from transformers import AutoModelForSequenceClassification
  from transformers.utils import logging

  logging.disable_progress_bar()
  first_name = next(iter(folders))
  outputs = len(load_adapter(folders[first_name]).about["labels"]) or 1
  model: Any = AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=outputs
  )
  for name, folder in folders.items():
    theirs = folder.with_name(f"{name}-peft")
    export_adapter(folder, theirs, base=str(base))
    if name == first_name:
      model = PeftModel.from_pretrained(model, theirs, adapter_name=name)
    else:
      model.load_adapter(theirs, adapter_name=name)
  model.eval()
  tokenizer = load_tokenizer(base)

  def answer(first: list[str], second: list[str] | None) -> np.ndarray:
    parts = []
    for start in range(0, len(first), batch):
      part = slice(start, start + batch)
      encoded = tokenizer(
        first[part],
        second and second[part],
        truncation="longest_first",
        max_length=128,
        padding=True,
        return_tensors="pt",
      )
      with torch.inference_mode():
        parts.append(model(**encoded).logits.numpy())
    return np.concatenate(parts)

  def switching() -> np.ndarray:
    out = np.empty((len(texts.first), outputs), np.float32)
    for name in folders:
      model.set_adapter(name)
      mine, first, second = texts.of(name)
      out[mine] = answer(first, second)
    return out

  def single() -> np.ndarray:
    model.set_adapter(first_name)
    return answer(*texts[:2])

  return {PEFT: switching, PEFT_SINGLE: single}


def allocate(count: int, *, rank: int) -> dict[str, Any]:
  """Bytes of so many RoBERTa-base adapters, and seconds to replace one.

  The heads are left out: RoBERTa's own, 2.4 MB each, is as large with any
  method.
  """
  fields, adapter = roberta(*SIZES["roberta-base"]), vera(rank)
  network = blueprint(fields, outputs=2, adapter=(adapter, ("query", "value")))
  shapes = {
    path: leaf_shapes(adapter, path, target)
    for path, target in network.targets.items()
  }
  stacked = jax.block_until_ready(empty_stack(shapes, capacity=count))
  sizes = [leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(stacked)]
  leaves = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
  seconds = []
  for slot in range(0, count, -(-count // 20)):
    start = time.perf_counter()
    stacked = jax.block_until_ready(set_slot(stacked, np.int32(slot), leaves))
    seconds.append(time.perf_counter() - start)
  return {
    "adapters": count,
    "rank": rank,
    "bytes": sum(sizes),
    "bytes_each": sum(sizes) / count,
    "seconds_to_replace_one": statistics.median(seconds[1:]),
  }


def show(result: Mapping[str, Any]) -> None:
  """The figures as a table on standard output."""
  console, count = Console(), result["examples"]
  columns = ("texts per second", "slowest to fastest", "logits apart")
  table = Table(
    "variant",
    *(Column(name, justify="right") for name in columns),
    title=f"{count} texts, {result['adapters']} adapters,"
    f" VeRA r = {result['rank']}",
  )
  for name, variant in result["ways"].items():
    seconds, apart = variant["seconds"], variant["largest_logit_difference"]
    table.add_row(
      name,
      f"{variant['examples_per_second']:.0f}",
      f"{count / max(seconds):.0f} to {count / min(seconds):.0f}",
      "" if apart is None else f"{apart:.1e}",
    )
  console.print(table)
  if PEFT not in result["ways"]:
    console.print("PEFT is left out: pip install -r requirements-parity.txt")
  other = result["logits_apart_between_adapters"]
  console.print(f"Between two adapters' logits: up to {other:.2f}.")
  each = result["bytes_of_the_bank"] / result["adapters"]
  console.print(f"The bank: {each / 1e3:.1f} kB per adapter with its head.")
  if big := result.get("roberta_base"):
    console.print(
      f"{big['adapters']:,} RoBERTa-base adapters, r = {big['rank']}:"
      f" {big['bytes'] / 1e9:.3f} GB, {big['bytes_each']:,.0f} bytes each,"
      f" one replaced in {big['seconds_to_replace_one'] * 1e3:.2f} ms."
    )


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__, torch=True)
