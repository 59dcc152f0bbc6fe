"""Many adapters in one batch, against a pass for each and against PEFT.

  python -m experiments.benchmark bank
  python -m experiments.benchmark bank --task=sst2 --source=GLUE_FOLDER

N VeRA adapters on all-MiniLM-L6-v2, each with numbers of its own, answer the
same texts, each text by one of them: in mixed batches from one bank, in N
passes of one adapter each, all by one adapter in ordinary batches, and in
PEFT's torch, which sets one adapter after another. From texts to logits, so
tokenising counts everywhere. Median of the repetitions, which take turns.

The logits of bank, passes and PEFT are compared. Then the adapters of 10,000
RoBERTa-base models are allocated for their bytes, and one of them replaced.
PEFT's rows need torch and peft: requirements-parity.txt.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.report import environment, interleaved, write
from configs import minilm
from vera_jax.models.roberta import roberta

BANK, PASSES, SINGLE = "bank, mixed", "a pass for each", "one for all"
PEFT, PEFT_SINGLE = "PEFT, switching", "PEFT, one for all"
Way = Callable[[], np.ndarray]


class Texts(NamedTuple):
  """What is answered: texts, or pairs, and which adapter answers each."""

  first: list[str]
  second: list[str] | None
  adapters: list[str]

  def of(self, name: str) -> tuple[list[int], list[str], list[str] | None]:
    """The places of an adapter's texts, and those texts."""
    mine = [i for i, own in enumerate(self.adapters) if own == name]
    pairs = self.second and [self.second[i] for i in mine]
    return mine, [self.first[i] for i in mine], pairs


def define_flags() -> None:
  flags.DEFINE_integer("adapters", 16, "N.", lower_bound=1)
  flags.DEFINE_integer("examples", 256, "Texts in all.", lower_bound=1)
  flags.DEFINE_integer("rank", 256, "VeRA's rank.", lower_bound=1)
  flags.DEFINE_integer("repetitions", 5, "Timed runs.", lower_bound=1)
  flags.DEFINE_integer("batch", 32, "Texts of a batch in PEFT.", lower_bound=1)
  flags.DEFINE_integer(
    "stack", 10_000, "RoBERTa-base adapters to allocate; 0 for none."
  )
  flags.DEFINE_string("task", "generated_entailment", "Whose dev set is read.")
  flags.DEFINE_string("source", "experiments", "A folder of GLUE's files.")
  flags.DEFINE_string("base", minilm.ENCODER, "The encoder.")
  flags.DEFINE_string("out", "results/benchmarks", "Where bank.json goes.")


def main() -> None:
  given = flags.FLAGS
  result = environment("bank")  # the load, before there is ours
  result |= measure(
    given.base,
    task=given.task,
    source=given.source,
    adapters=given.adapters,
    examples=given.examples,
    rank=given.rank,
    repetitions=given.repetitions,
    batch=given.batch,
  )
  if given.stack:
    result["roberta_base"] = allocate(given.stack, rank=1024)
  show(result)
  print(write("bank", result, folder=given.out))


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
  """Every way's seconds and how far its logits are from the bank's."""
  from vera_jax.hub import resolve
  from vera_jax.serve.bank import AdapterBank

  with tempfile.TemporaryDirectory() as place:
    names = [f"adapter{i}" for i in range(adapters)]
    folders = {name: Path(place) / name for name in names}
    make_adapters(folders, base=base, task=task, rank=rank)
    texts = read_texts(names, task=task, source=source, count=examples)
    bank = AdapterBank(folders)
    ways: dict[str, Way] = {
      BANK: partial(bank.logits, *texts[:2], adapters=texts.adapters)
    }
    ways |= ways_of_predictor(folders, texts)
    if find_spec("torch") and find_spec("peft"):
      ways |= ways_of_peft(folders, texts, base=resolve(base), batch=batch)
    logits = {name: run() for name, run in ways.items()}  # compiles, too
    seconds = interleaved(ways, repetitions=repetitions)
  return {
    "base": base,
    "task": task,
    "adapters": adapters,
    "rank": rank,
    "examples": len(texts.first),
    "bytes_of_the_bank": bank.nbytes,
    # what a text answered by another's adapter would look like
    "logits_apart_between_adapters": float(
      np.abs(logits[SINGLE] - logits[BANK]).max()
    ),
    "ways": {
      name: {
        "examples_per_second": len(texts.first) / statistics.median(times),
        "seconds": times,
        "largest_logit_difference": _apart(logits, name),
      }
      for name, times in seconds.items()
    },
  }


def _apart(logits: dict[str, np.ndarray], name: str) -> float | None:
  """From the bank's logits; None where other adapters answer."""
  if name in (BANK, SINGLE, PEFT_SINGLE):
    return None
  return float(np.abs(logits[name] - logits[BANK]).max())


def make_adapters(
  folders: dict[str, Path], *, base: str, task: str, rank: int
) -> None:
  """Saved adapters, drawn around where training starts."""
  import jax

  from vera_jax.adapters.apply import adapt
  from vera_jax.adapters.files import save_adapter
  from vera_jax.adapters.labels import label_tree, split
  from vera_jax.adapters.methods import make_adapter
  from vera_jax.adapters.projections import PRNG, digest
  from vera_jax.hub import resolve
  from vera_jax.models.bert import BertClassifier
  from vera_jax.models.hf_weights import fingerprint, load_config
  from vera_jax.tasks.glue import glue_task

  # PEFT makes its own matrices of the key, so that both compute the same
  settings = {**minilm.get_config().vera.to_dict(), "rank": rank}
  settings["init"] = "peft"
  labels, folder = glue_task(task).labels, resolve(base)
  method, targets = make_adapter("vera", settings)
  assert method is not None
  model = BertClassifier(load_config(folder), len(labels) or 1)
  adapted = adapt(model, method, targets=targets)
  ids = jax.ShapeDtypeStruct((1, 8), np.int32)
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), ids)["params"]
  trained, _ = split(shapes, label_tree(shapes, "vera"))
  about = {
    "task": task,
    "method": "vera",
    "settings": settings,
    "base": base,
    "base_fingerprint": fingerprint(folder),
    "labels": list(labels),
    "projection_prng": PRNG,
    "projection_digest": digest(method.projections(adapted.find_targets(ids))),
    "max_length": 128,
  }
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    start = settings["d_init"] if path[-1].key == "vera_d" else 0.0
    return rng.normal(start, 0.05, leaf.shape).astype(np.float32)

  for place in folders.values():
    leaves = jax.tree_util.tree_map_with_path(draw, trained)
    save_adapter(place, leaves, about=about)


def read_texts(
  names: list[str], *, task: str, source: str, count: int
) -> Texts:
  """Texts of the task's dev set, dealt to the adapters in turn."""
  from vera_jax.data.examples import subset
  from vera_jax.tasks.glue import glue_task
  from vera_jax.tasks.glue_data import load_split

  chosen = glue_task(task)
  found = load_split(chosen, source, chosen.dev_splits[0])
  found = subset(found, min(count, len(found)), 0)
  dealt = [names[i % len(names)] for i in range(len(found))]
  return Texts(found.first, found.second, dealt)


def ways_of_predictor(folders: dict[str, Path], texts: Texts) -> dict[str, Way]:
  """One compiled program that runs with one adapter after another."""
  from vera_jax.adapters.files import load_adapter
  from vera_jax.adapters.labels import join, label_tree, split
  from vera_jax.models.pretrained import restore_adapter
  from vera_jax.serve.predictor import Predictor

  restored = {
    name: restore_adapter(load_adapter(place))
    for name, place in folders.items()
  }
  first = next(iter(restored.values()))
  labels = label_tree(first.params, "vera")
  _, base = split(first.params, labels)
  # one base in memory for all
  classifiers = {
    name: own._replace(params=join(split(own.params, labels)[0], base))
    for name, own in restored.items()
  }
  predictor = Predictor(first)

  def passes() -> np.ndarray:
    out = np.empty((len(texts.first), first.outputs), np.float32)
    for name in classifiers:
      predictor.classifier = classifiers[name]
      mine, some, others = texts.of(name)
      out[mine] = predictor.logits(some, others)
    return out

  def single() -> np.ndarray:
    predictor.classifier = first
    return predictor.logits(*texts[:2])

  return {PASSES: passes, SINGLE: single}


def ways_of_peft(
  folders: dict[str, Path], texts: Texts, *, base: Path, batch: int
) -> dict[str, Way]:
  """PEFT's torch on padded batches, its adapters from our own folders."""
  import torch

  from vera_jax.data.tokenizer import load_tokenizer

  tokenizer = load_tokenizer(base)
  model = _peft_model(folders, base)
  outputs = model.config.num_labels

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
    model.set_adapter(next(iter(folders)))
    return answer(*texts[:2])

  return {PEFT: switching, PEFT_SINGLE: single}


def _peft_model(folders: dict[str, Path], base: Path) -> Any:
  from peft import PeftModel
  from transformers import AutoModelForSequenceClassification
  from transformers.utils import logging

  from vera_jax.adapters.files import load_adapter
  from vera_jax.peft_io import export_adapter

  logging.disable_progress_bar()
  theirs = {
    name: place.with_name(f"{name}-peft") for name, place in folders.items()
  }
  for name, place in folders.items():
    export_adapter(place, theirs[name], base=str(base))
  first, *rest = theirs
  labels = len(load_adapter(folders[first]).about["labels"]) or 1
  plain = AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=labels
  )
  model = PeftModel.from_pretrained(plain, theirs[first], adapter_name=first)
  for name in rest:
    model.load_adapter(theirs[name], adapter_name=name)
  return model.eval()


def allocate(count: int, *, rank: int) -> dict[str, Any]:
  """Bytes of so many RoBERTa-base adapters, and seconds to replace one.

  The heads are left out: RoBERTa's own, 2.4 MB each, is as large with any
  method.
  """
  import jax
  from flax.traverse_util import flatten_dict

  from vera_jax.adapters.apply import adapt
  from vera_jax.adapters.labels import ADAPTER, label_tree
  from vera_jax.adapters.vera import vera
  from vera_jax.models.bert import BertClassifier, BertConfig
  from vera_jax.serve.bank import set_slot
  from vera_jax.train.multi_adapter import empty_stack

  model = BertClassifier(BertConfig.from_dict(roberta(768, 12)), 2)
  adapted = adapt(model, vera(rank), targets=["query", "value"])
  ids = jax.ShapeDtypeStruct((1, 8), np.int32)
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), ids)["params"]
  kinds = flatten_dict(label_tree(shapes, "vera"))
  trained = {
    path: leaf
    for path, leaf in flatten_dict(shapes).items()
    if kinds[path] == ADAPTER
  }
  stacked = jax.block_until_ready(empty_stack(trained, capacity=count))
  sizes = [leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(stacked)]
  leaves = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), trained)
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


def show(result: dict[str, Any]) -> None:
  """The figures as a table on standard output."""
  title = f"{result['examples']} texts, {result['adapters']} adapters"
  table = Table(title=f"{title}, VeRA r = {result['rank']}")
  table.add_column("way")
  for name in ("examples a second", "slowest to fastest", "logits apart"):
    table.add_column(name, justify="right")
  for name, way in result["ways"].items():
    rates = [result["examples"] / seconds for seconds in way["seconds"]]
    apart = way["largest_logit_difference"]
    table.add_row(
      name,
      f"{way['examples_per_second']:.0f}",
      f"{min(rates):.0f} to {max(rates):.0f}",
      "" if apart is None else f"{apart:.1e}",
    )
  console = Console()
  console.print(table)
  if PEFT not in result["ways"]:
    console.print("PEFT is left out: pip install -r requirements-parity.txt")
  other = result["logits_apart_between_adapters"]
  console.print(f"Between two adapters' logits: up to {other:.2f}.")
  each = result["bytes_of_the_bank"] / result["adapters"]
  console.print(f"The bank: {each / 1e3:.1f} kB an adapter with its head.")
  if big := result.get("roberta_base"):
    console.print(
      f"{big['adapters']:,} RoBERTa-base adapters, r = {big['rank']}:"
      f" {big['bytes'] / 1e9:.3f} GB, {big['bytes_each']:,.0f} bytes each,"
      f" one replaced in {big['seconds_to_replace_one'] * 1e3:.2f} ms."
    )
