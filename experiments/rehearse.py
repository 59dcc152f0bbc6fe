"""Rehearse every command of docs/reproduce.md, from the weights to the verdict.

  python -m experiments.rehearse --out=FOLDER
  python -m experiments.rehearse --out=FOLDER --small --only="Table 2"
  python -m experiments.rehearse --out=FOLDER --tokenizers=FOLDER

Random weights in the hub's layout, which transformers and torch write (make
parity), in the paper's models' own shapes cut to two layers; data of the files'
forms, made of experiments/e2e_rows and of noise; then the page's commands for
one epoch, with all seeds. A judge is played by drawn scores. It ends with what
verdicts each table got, and fails if a number got none that could have one.

--small makes the models 64 wide. --tokenizers names a folder with the models'
own, in roberta-base/, gpt2/ and llama/; for those that it lacks byte-level
tokenizers of the same form stand in. Given again, the command goes on.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

from configs import paper
from experiments import cli
from experiments.reproduce import report_command, sweep_command
from vera_jax.errors import UserError
from vera_jax.files import write_json, write_text
from vera_jax.models.paper_sizes import OTHERS, SIZES
from vera_jax.places import local_place
from vera_jax.report.published import cells
from vera_jax.report.verdict import JUDGED, MISSING

OUT = flags.DEFINE_string("out", None, "Where all of it goes.")
ONLY = flags.DEFINE_multi_string("only", [], 'A table or figure: "Table 2".')
SWEEPS = flags.DEFINE_list(
  "sweeps", [], 'Of these sweeps alone, as "glue:base". The others are missing.'
)
ONE = flags.DEFINE_bool(
  "one", False, "One run of each sweep, four of Figure 2's; others are missing."
)
SMALL = flags.DEFINE_bool("small", False, "Models 64 wide.")
TOKENIZERS = flags.DEFINE_string("tokenizers", None, "The models' own.")

ROWS = Path(__file__).parent / "e2e_rows"
LAYERS = 2
# Feed-forward widths that are not four times the model's.
INNER = {4096: 11008, 5120: 13824}
FORMS = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
# What cuts a run: flat keys of the base.
CUTS: dict[str, dict[str, Any]] = {
  "glue": {},
  "images": {},
  "e2e": {"generate.beams": 2, "generate.max_new_tokens": 4},
  "instruct": {
    "data.dev_examples": 8,
    "data.max_train_examples": 32,
    "data.max_test_examples": 2,
    "generate.max_new_tokens": 4,
    "generate.rows": 2,
  },
}
KINDS = {"ablations": "glue", "rank": "glue"}  # the data of other sweeps
# The shards of --one, where one run has no verdict: Figure 2's number is VeRA's
# score at its largest rank less LoRA's at its least, and has no spread, so that
# each needs two seeds.
SHARDS = {"rank:large": (0, 1, 60, 61)}
JAVA = ("METEOR", "ROUGE_L", "CIDEr")


def main() -> None:
  if not OUT.value:
    raise UserError("Say where the rehearsal goes: --out=FOLDER")
  tables = ONLY.value or [*paper.SOURCES]
  if unknown := sorted({*tables} - {*paper.SOURCES}):
    raise UserError(f"--only: {unknown[0]} is none of {[*paper.SOURCES]}.")
  out, lacking = local_place(OUT.value, "--out").absolute(), []
  local_place(TOKENIZERS.value or "", "--tokenizers")
  for table in tables:
    verdicts = rehearse(table, out)
    lacking += [
      f"{table}, {row.row}, {row.column}: {row.note}"
      for row in verdicts.itertuples()
      if row.verdict == MISSING and not _excused(row)
    ]
    counts = verdicts["verdict"].value_counts()
    print(
      f"{table}: " + ", ".join(f"{n} {name}" for name, n in counts.items()),
      flush=True,
    )
  if lacking and not (SWEEPS.value or ONE.value):
    raise UserError("\n".join(["No verdict:", *lacking]))


def _excused(row: Any) -> bool:
  """Whether this machine can't have the number."""
  if row.column in JAVA:
    return shutil.which("java") is None
  return "memory" in row.column and "doesn't say its peak" in row.note


def rehearse(table: str, out: Path) -> pd.DataFrame:
  """Runs the commands of a table, and returns its verdicts."""
  source, judgments = paper.SOURCES[table], []
  for name in source.sweeps:
    if SWEEPS.value and name not in SWEEPS.value:
      continue
    config = paper.load(name)
    study, _, variant = name.partition(":")
    kind = KINDS.get(study, study)
    settings = {
      "model.name": make_weights(config.base.model.name, out / "weights"),
      "data.source": make_data(kind, variant, out / "data"),
      "data.cache_dir": out / "tokens",
      "optim.epochs": 1,
      **CUTS[kind],
    }
    command = sweep_command(name)
    command[-1] = command[-1].replace("DIR/", f"{out}/")
    command += [f"--config.base.{k}={x}" for k, x in settings.items()]
    shards: list[list[str]] = [[]]
    if ONE.value:
      count = len(config.overrides)
      shards = [[f"--shard={i}/{count}"] for i in SHARDS.get(name, (0,))]
    for shard in shards:
      _run(command + shard, out)
    if source.after:
      judgments += judge(name, out)
  folders = [part.replace("DIR/", f"{out}/") for part in report_command(table)]
  verdicts = out / "verdicts" / table.replace(" ", "-")
  command = [part for part in folders if _is_there(part, out)]
  command += [f"--out={verdicts}", "--format=csv"]
  _run(command + [f"--judgments={file}" for file in judgments], out)
  shown = pd.read_csv(verdicts / "against_paper.csv", keep_default_na=False)
  shown = shown[shown["table"] == table]
  wanted = [cell for cell in cells() if cell.table == table]
  if len(shown) != len(wanted):
    raise UserError(f"{table}: {len(shown)} verdicts on {len(wanted)} numbers.")
  if (shown["ours"] == "").all():
    raise UserError(f"{table}: no number of ours.")
  return shown


def _is_there(argument: str, out: Path) -> bool:
  return not argument.startswith(str(out)) or Path(argument).is_dir()


def _run(command: list[str], out: Path) -> None:
  """Runs a command of the page, without the hub.

  Raises:
    UserError: it failed; with its last lines.
  """
  print(" ".join(command), file=sys.stderr, flush=True)
  done = subprocess.run(
    [sys.executable, "-m", "vera_jax", *command[1:]],
    env={**os.environ, "HF_HUB_OFFLINE": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  with (out / "commands.log").open("a", encoding="utf-8") as log:
    log.write(f"{' '.join(command)}\n{done.stdout}{done.stderr}\n")
  if done.returncode:
    last = "\n".join(done.stderr.strip().splitlines()[-5:])
    raise UserError(f"{' '.join(command)} failed:\n{last}")


def judge(name: str, out: Path) -> list[Path]:
  """Answers of a sweep's runs, and drawn scores in FastChat's form."""
  rng, files = np.random.default_rng(0), []
  questions = "vicuna" if name.endswith(":vicuna") else "mt_bench"
  asked = out / "data" / f"{questions}.jsonl"
  write_text(asked, "".join(_questions(questions)))
  for run in sorted((out / name.replace(":", "-") / "runs").iterdir()):
    answers = out / "answers" / f"{run.name}.jsonl"
    answers.parent.mkdir(exist_ok=True)
    if not answers.exists():
      command = ["vera-jax", "answer"]
      command += [f"--adapter={run}/adapter", f"--questions={asked}"]
      _run([*command, f"--out={answers}", "--max_new_tokens=4"], out)
    lines = []
    for line in answers.read_text(encoding="utf-8").splitlines():
      answer = json.loads(line)
      for turn, _ in enumerate(answer["choices"][0]["turns"], 1):
        lines.append(
          {
            "question_id": answer["question_id"],
            "model": answer["model_id"],
            "judge": ["drawn", "single-v1"],
            "score": int(rng.integers(1, 11)),
            "turn": turn,
          }
        )
    files.append(out / "answers" / f"{run.name}-judged.jsonl")
    write_text(files[-1], "".join(json.dumps(x) + "\n" for x in lines))
  return files


def _questions(name: str) -> Iterator[str]:
  for number in [*JUDGED[name]][:2]:
    one = {"question_id": number, "category": "writing"}
    turns = ["Name a place to eat.", "And a cheaper one?"]
    yield json.dumps({**one, "turns": turns}) + "\n"


def make_weights(name: str, folder: Path) -> Path:
  """A folder in the hub's layout for a model of the paper, random."""
  folder = folder / Path(name).name
  if (folder / "config.json").exists():
    return folder
  try:
    import torch
    import transformers
  except ImportError as error:
    raise UserError(f"torch writes the weights: make parity ({error}).") from (
      error
    )
  width, _ = (SIZES | OTHERS)[name]
  inner = INNER.get(width, 4 * width)
  heads = width // (128 if "lama" in name else 64)
  if SMALL.value:
    width, inner, heads = 64, 256, 2
  torch.manual_seed(0)
  fields: Any  # their constructors take what they know
  model: Any
  common: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": LAYERS}
  common |= {"num_attention_heads": heads, "intermediate_size": inner}
  if name.startswith("roberta"):
    fields = transformers.RobertaConfig(
      **common,
      vocab_size=50265,
      max_position_embeddings=514,
      type_vocab_size=1,
      layer_norm_eps=1e-5,
    )
    model, tokenizer = transformers.RobertaForMaskedLM(fields), "roberta-base"
  elif name.startswith("gpt2"):
    fields = transformers.GPT2Config(n_embd=width, n_layer=LAYERS, n_head=heads)
    model, tokenizer = transformers.GPT2LMHeadModel(fields), "gpt2"
  elif "lama" in name:
    fields = transformers.LlamaConfig(**common, vocab_size=32000)
    model, tokenizer = transformers.LlamaForCausalLM(fields).half(), "llama"
  else:
    side = 32 if SMALL.value else 224
    fields = transformers.ViTConfig(**common, image_size=side)
    model, tokenizer = transformers.ViTModel(fields), ""
    size = {"height": side, "width": side}
    processor = {"do_resize": True, "size": size, "resample": 2}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
  folder.mkdir(parents=True, exist_ok=True)
  if tokenizer:
    _write_tokenizer(tokenizer, folder)
  else:
    write_json(folder / "preprocessor_config.json", {**processor, **half})
  model.save_pretrained(folder)  # config.json comes with it
  return folder


def _write_tokenizer(name: str, folder: Path) -> None:
  """The model's own where there is one, else bytes in the same form."""
  real = None
  if TOKENIZERS.value:
    real = local_place(TOKENIZERS.value, "--tokenizers") / name
  if real and real.is_dir():
    for file in FORMS:
      if (real / file).is_file():
        shutil.copyfile(real / file, folder / file)
    return
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  special = {
    "roberta-base": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "gpt2": ["<|endoftext|>"],
    "llama": ["<unk>", "<s>", "</s>"],
  }[name]
  symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
  vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
  if name != "llama":
    write_json(folder / "vocab.json", vocabulary)
    write_text(folder / "merges.txt", "#version: 0.2\n")
    return
  from transformers import PreTrainedTokenizerFast

  bytewise = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
  bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bytewise.decoder = decoders.ByteLevel()
  PreTrainedTokenizerFast(
    tokenizer_object=bytewise,
    unk_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
  ).save_pretrained(folder)


def _pairs(split: str) -> list[list[str]]:
  """Facts and sentences of experiments/e2e_rows."""
  text = (ROWS / f"{split}.txt").read_text(encoding="utf-8")
  return [line.split("||") for line in text.splitlines()]


def make_data(kind: str, variant: str, folder: Path) -> Path:
  """Files of the data set's form, few rows each."""
  if kind == "images":
    return _make_images(folder / variant.rpartition("_")[0])
  target = folder / kind
  if kind == "instruct":
    rows = [
      {"instruction": "Write a sentence.", "input": facts, "output": text}
      for facts, text in _pairs("train")[:56]
    ]
    target = folder / "alpaca.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(target, rows)
  elif kind == "e2e":
    target.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 16), ("valid", 8), ("test", 8)):
      lines = ["||".join(pair) for pair in _pairs(split)[:count]]
      write_text(target / f"{split}.txt", "\n".join([*lines, ""]))
  else:
    _make_glue(target)
  return target


def _make_glue(folder: Path) -> None:
  from vera_jax.tasks.glue_data import file_name
  from vera_jax.tasks.glue_facts import TASKS

  sentences = [text for _, text in _pairs("train")]
  rng = np.random.default_rng(0)
  for task in TASKS.values():
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    for split in task.splits:
      test = split in task.test_splits
      bare = bool(task.headerless) and not test
      columns = ["index", *task.file_columns, task.file_label]
      columns = list(task.headerless) if bare else columns
      lines = [] if bare else ["\t".join(columns)]
      for i in range(16):
        texts = rng.choice(sentences, 2)
        row: dict[str, Any] = dict(zip(task.file_columns, texts, strict=False))
        label = task.written[i % len(task.written)] if task.written else i % 6
        row |= {"index": i, task.file_label: label}
        lines.append("\t".join(str(row.get(name, "-")) for name in columns))
      path = folder / task.folder / file_name(split)
      write_text(path, "\n".join([*lines, ""]))


def _make_images(folder: Path) -> Path:
  from PIL import Image

  rng = np.random.default_rng(0)
  splits: Mapping[str, int] = {"train": 10, "test": 4}
  if "resisc45" in folder.name:  # it has no test split
    splits = {"": 14}
  for split, count in splits.items():
    for name in ("field", "river"):
      target = folder / split / name
      target.mkdir(parents=True, exist_ok=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(target / f"{i}.png")
  return folder


if __name__ == "__main__":
  cli.run(main, usage=__doc__, torch=True)
