"""The readers of files that come from elsewhere, each with its clean files.

A reader is what a user's command calls for files of a kind. A new one is a
function in `clean.py` that writes small clean files, one here that reads them,
and a line in `READERS`.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from tests.fuzz import clean
from vera_jax.adapters.table import METHODS
from vera_jax.errors import UserError

# PEFT's forms, by the first of our methods that each holds; DoRA is its LoRA.
FORMS = ("vera", "lora", "dora", "ia3", "pvera", "randlora", "unilora")
# The files of llama.cpp's architectures, by the model that is written as one.
GGUFS = {
  "llama": ("llama", "gguf-q8_0"),
  "qwen2": ("qwen2", "gguf-q8_0"),
  "qwen3": ("qwen3", "gguf-f16"),
  "gemma3": ("gemma3_text", "gguf-q8_0"),
  "gpt2": ("gpt2", "gguf-f16"),
}


class Reader(NamedTuple):
  """How files of a kind are read.

  Attributes:
    write: clean files, into an empty folder.
    read: that folder's, as a user's command does.
    harmed: a pattern of those files that a mutation may change.
    named: whether the user names these files, and may have them elsewhere.
    starts: whether a Python process is started, to run what is in them.
  """

  write: Callable[[Path], Any]
  read: Callable[[Path], Any]
  harmed: str = "**/*"
  named: bool = False
  starts: bool = False


def read_model(folder: Path) -> None:
  from vera_jax.pretrained.classifier import load_classifier

  load_classifier(folder, scan=False)


def read_tokenizer(folder: Path) -> None:
  """Its tokens, made as for training and kept in a cache."""
  from vera_jax.data.examples import Examples
  from vera_jax.data.tokens import FolderTokenizer, tokenise

  texts = ["a fine film", "the river runs low", "naïve 你好 😀"]
  examples = Examples(texts, None, None, np.arange(len(texts)))
  cache = folder / "cache"
  tokenise(examples, FolderTokenizer(folder, cache), 16, cache)


def read_template(folder: Path) -> None:
  """A conversation as it is learned, and a question as it is asked."""
  from vera_jax.data.chat import message_ids, render_conversation
  from vera_jax.data.tokenizer import load_tokenizer

  tokenizer = load_tokenizer(folder)
  said = [("user", "Why?"), ("assistant", "So."), ("user", "How?")]
  messages = [{"role": role, "content": text} for role, text in said]
  render_conversation(tokenizer, [*messages, messages[1]])
  message_ids(tokenizer, "the river")


def write_cached(folder: Path) -> None:
  clean.write_wordpiece(folder)
  read_tokenizer(folder)


def read_adapter(folder: Path) -> None:
  """As it is used, and as it is shown on the hub."""
  from vera_jax.adapters.card import model_card, published
  from vera_jax.adapters.files import load_adapter
  from vera_jax.pretrained.classifier import restore_adapter

  saved = load_adapter(folder / "adapter")
  model_card(published(saved.about))
  restore_adapter(saved, folder / "base")


def read_peft(folder: Path) -> None:
  from vera_jax.peft_io import import_adapter

  out = folder / "imported"
  import_adapter(folder / "adapter", out, base=str(folder / "base"))


def read_gguf(folder: Path) -> None:
  from vera_jax.data.tokenizer import load_tokenizer
  from vera_jax.models.folder import resolve
  from vera_jax.pretrained.classifier import load_classifier

  whole = folder / "model.gguf"
  parts = sorted(folder.glob("model-00001-of-*.gguf"))
  made = resolve(parts[0] if parts else whole)
  load_tokenizer(made)
  load_classifier(made, scan=False)


def read_gguf_adapter(folder: Path) -> None:
  from vera_jax.peft_io.gguf import import_gguf_adapter

  base, out = str(folder / "base"), folder / "imported"
  import_gguf_adapter(folder / "adapter.gguf", out, base=base)


def read_decoder(folder: Path) -> None:
  """As what writes texts, and as what becomes a GGUF file."""
  from vera_jax.export.gguf import write_gguf_of
  from vera_jax.generate.generator import Generator
  from vera_jax.pretrained.classifier import load_classifier

  generator = Generator(load_classifier(folder, scan=False))
  generator.encode("the river", max_new_tokens=4)
  write_gguf_of(folder, folder / "out.gguf", kind="gguf-f16")


def read_table(folder: Path, name: str) -> None:
  """A run's own texts, and the same file as what is to be predicted."""
  from configs import text
  from vera_jax.data.tables import file_rows
  from vera_jax.data.texts import read_texts
  from vera_jax.tasks.task import task_for

  config = text.get_config()
  config.data.train, config.data.label = str(folder / name), "label"
  config.data.text = ("premise", "hypothesis")
  columns = (("premise", "hypothesis"),)
  list(read_texts(file_rows(folder / name), columns=columns))
  task_for(config)


def read_glue(folder: Path) -> None:
  from vera_jax.tasks.glue_data import load_split
  from vera_jax.tasks.glue_facts import TASKS

  for name in ("cola", "stsb", "mrpc"):
    for split in TASKS[name].splits:
      load_split(TASKS[name], folder, split)


def read_superglue(folder: Path) -> None:
  from vera_jax.tasks.glue_data import load_split
  from vera_jax.tasks.superglue import TASKS

  for facts in TASKS.values():
    for split in ("train", "validation", "test"):
      load_split(facts, folder, split)


def read_e2e(folder: Path) -> None:
  from vera_jax.tasks.e2e_files import read_split

  _all(
    partial(read_split, folder, "train"), partial(read_split, folder, "valid")
  )


def _all(*reads: Callable[[], Any]) -> None:
  """Read all, also after one that is refused, which is said in the end."""
  refused: UserError | None = None
  for read in reads:
    try:
      read()
    except UserError as error:
      refused = error
  if refused:
    raise refused


def read_scoring(folder: Path) -> None:
  from vera_jax.tasks.e2e_files import read_for_scoring

  table, lines = folder / "references.csv", folder / "references.txt"
  _all(
    partial(read_for_scoring, folder / "outputs.txt", lines),
    partial(read_for_scoring, table, table),
  )


def read_language(folder: Path) -> None:
  from configs import language
  from vera_jax.tasks.task import task_for

  config = language.get_config()
  config.data.train = str(folder / "train.txt")
  task_for(config)


def read_instructions(folder: Path) -> None:
  from configs import instruct
  from vera_jax.tasks.instruct_files import as_text, read_splits

  for name in ("alpaca.json", "messages.jsonl"):
    data = instruct.get_config().data
    data.source, data.dev_examples = str(folder / name), 2
    data.tuning_examples = 0
    for row in read_splits(data).train:
      as_text(row, "plain")


def read_questions(folder: Path) -> None:
  from vera_jax.generate.choices import read_choices
  from vera_jax.report.verdict import read_judgments
  from vera_jax.serve.questions import read_judge_questions

  read_judge_questions(folder / "judge.jsonl")
  read_judgments(folder / "judged.jsonl", 1)
  read_choices([str(folder / "copa.jsonl"), str(folder / "arc.json")])


def read_pictures(folder: Path) -> None:
  """As a run prepares them."""
  from configs.images import cifar10
  from vera_jax.tasks.task import task_for

  config = cifar10.get_config()
  config.data.source, config.data.shots = str(folder / "data"), 2
  config.data.image_size, config.data.dev_shots = None, 1
  config.data.cache_dir = str(folder / "cache")
  config.data.max_train_examples = config.data.max_eval_examples = None
  task_for(config).load(config, folder / "base")


def write_cached_pictures(folder: Path) -> None:
  clean.write_pictures(folder)
  read_pictures(folder)


def read_run(folder: Path) -> None:
  """As resuming, sweeping and reporting do."""
  from configs import rte
  from vera_jax import results
  from vera_jax.locks import describe_owner, is_locked
  from vera_jax.report import frame, summary, tables
  from vera_jax.report.outputs import side_by_side
  from vera_jax.sweep.table import read_progress
  from vera_jax.train.logging import MetricWriter
  from vera_jax.train.workdir import check_workdir, first_start

  run = folder / "run"
  config = json.loads(json.dumps(rte.get_config("large").to_dict()))

  def report() -> None:
    sweep = frame.load_sweep(folder)
    tables.page(sweep, summary(sweep))
    side_by_side(sweep)
    for table in (frame.history, frame.steps, frame.norms):
      table(sweep.runs)

  def resume() -> None:
    with MetricWriter(run, config=config, step=3):
      pass

  _all(
    partial(check_workdir, run, config),
    partial(first_start, run, 1.7e9),
    partial(results.read, run),
    partial(is_locked, run / "lock"),
    partial(describe_owner, run / "lock"),
    partial(read_progress, run),
    report,
    resume,
  )


def read_sweep(folder: Path) -> None:
  """As a sweep that goes on shows it, at a terminal and elsewhere."""
  from vera_jax.sweep.plan import make_units
  from vera_jax.sweep.table import LiveTable

  plan = clean.sweep_plan(folder)
  units = make_units(plan.runs, most=2)
  table = LiveTable(plan, units)
  with table.console.capture():
    table.console.print(table._draw())
    for unit in units:
      table.end(unit)


@cache
def _writers(folder: Path) -> Any:
  """A bank of `write_requests` with its rows, compiled once."""
  from vera_jax.serve.bank import AdapterBank
  from vera_jax.serve.rows import Rows

  ann = folder / "adapters" / "ann"
  bank = AdapterBank({"ann": ann}, capacity=3, base=folder / "base")
  rows = Rows(bank, rows=2, length=32, piece=16)
  rows.warm_up()
  return bank, rows


def ask_server(folder: Path) -> None:
  """Each body to its address; what is refused has a status below 500."""
  from starlette.testclient import TestClient

  from vera_jax.files import JSON, read_bytes
  from vera_jax.serve.http import Limits, Service

  bank, rows = _writers(folder)
  service = Service(
    bank,
    base="base",
    rows=rows,
    template="plain",
    limits=Limits(body=2**18, seconds=20),
    folders=[folder / "adapters"],
  )
  refused = ""
  with TestClient(service, base_url="http://localhost") as client:
    for file in sorted((folder / "bodies").iterdir()):
      body = read_bytes(file, inside=folder, limit=JSON)
      if file.suffix == ".txt":
        answer = client.get(f"/v1/models/{quote(body[:5000])}")
      else:
        answer = client.post(
          f"/v1/{file.stem.replace('-', '/')}",
          content=body,
          headers={"Content-Type": "application/json"},
        )
      assert answer.status_code < 500, answer.text
      if answer.is_error and file.stem != "classify":  # the bank writes
        refused = answer.json()["error"]["message"]
  for name in {*bank} - {"ann"}:
    bank.remove(name)
  if "ann" not in bank:
    bank.add("ann", folder / "adapters" / "ann")
  if refused:
    raise UserError(refused)


def read_saves(folder: Path) -> None:
  from vera_jax.train.checkpoint import Checkpoints

  with Checkpoints(folder / "checkpoints", clean.CONFIG) as saves:
    if saves.latest_step is not None:
      saves.restore(saves.latest_step, clean.STATE)


READERS: dict[str, Reader] = {
  **{
    f"model {kind}": Reader(partial(clean.write_model, kind=kind), read_model)
    for kind in clean.MODELS
  },
  "model shards": Reader(
    partial(clean.write_model, kind="bert", shards=2), read_model, "*.json"
  ),
  "model merged": Reader(clean.write_merged, read_model, "*.json"),
  "decoder": Reader(clean.write_decoder, read_decoder, "*.json"),
  "tokenizer": Reader(clean.write_tokenizer, read_tokenizer),
  "chat template": Reader(
    clean.write_template, read_template, "*.j*n*", starts=True
  ),
  "tokenizer vocab.txt": Reader(clean.write_wordpiece, read_tokenizer),
  "tokenizer merges.txt": Reader(clean.write_merges, read_tokenizer),
  "tokens cached": Reader(write_cached, read_tokenizer, "cache/*"),
  **{
    f"adapter {method}": Reader(
      partial(clean.write_adapter, method=method), read_adapter, "adapter/*"
    )
    for method in (*METHODS, "vera+bitfit")
  },
  **{
    f"PEFT {form}": Reader(
      partial(clean.write_peft, form=form), read_peft, "adapter/*"
    )
    for form in FORMS
  },
  **{
    f"GGUF {name}": Reader(
      partial(clean.write_gguf, kind=kind, form=form), read_gguf, named=True
    )
    for name, (kind, form) in GGUFS.items()
  },
  "GGUF in parts": Reader(
    partial(clean.write_gguf, kind="llama", form="gguf-f16", parts=2),
    read_gguf,
    named=True,
  ),
  "GGUF adapter": Reader(
    clean.write_gguf_adapter, read_gguf_adapter, "adapter.gguf", named=True
  ),
  **{
    f"table {suffix}": Reader(
      partial(clean.write_table, name=f"train.{suffix}"),
      partial(read_table, name=f"train.{suffix}"),
      named=True,
    )
    for suffix in ("csv", "tsv", "json", "jsonl", "parquet")
  },
  "GLUE": Reader(clean.write_glue, read_glue),
  "SuperGLUE": Reader(clean.write_superglue, read_superglue),
  "E2E": Reader(clean.write_e2e, read_e2e),
  "E2E scoring": Reader(clean.write_scoring, read_scoring, named=True),
  "language": Reader(clean.write_language, read_language, named=True),
  "instructions": Reader(
    clean.write_instructions, read_instructions, named=True
  ),
  "questions": Reader(clean.write_questions, read_questions, named=True),
  "pictures folders": Reader(clean.write_pictures, read_pictures, "data/**/*"),
  "pictures Parquet": Reader(
    clean.write_picture_table, read_pictures, "data/*"
  ),
  "pictures preparation": Reader(clean.write_pictures, read_pictures, "base/*"),
  "pictures cached": Reader(write_cached_pictures, read_pictures, "cache/*"),
  "run": Reader(clean.write_run, read_run),
  "sweep": Reader(clean.write_sweep, read_sweep),
  "checkpoints": Reader(clean.write_saves, read_saves),
  "requests": Reader(clean.write_requests, ask_server, "bodies/*"),
}
