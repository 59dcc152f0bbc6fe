"""E2E: sentences about restaurants from their facts (the paper's Table 3).

The protocol is that of microsoft/LoRA's examples/NLG, which the paper follows.
An end-of-text token stands between input and text, and the text alone is
learned. The model of the last epoch, whatever its loss, answers each input of
the test split once, by beam search; these texts are scored against all that
people wrote for the input.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.completions import Completions
from vera_jax.data.examples import Examples, drawn
from vera_jax.data.written import write_written
from vera_jax.errors import UserError
from vera_jax.generate.beam import Beam
from vera_jax.generate.generator import Generator
from vera_jax.pretrained.classifier import Classifier
from vera_jax.progress import ProgressBar
from vera_jax.tasks.e2e_files import Pairs, read_split
from vera_jax.tasks.e2e_metrics import check_installed, score_texts
from vera_jax.tasks.language_modelling import language_modelling
from vera_jax.tasks.task import Presentation, Size, Task

NAMES = ("e2e",)
TOKENS = 53  # mean of a training row in GPT-2's tokens
INPUT = "{}"  # where config.data.prompt has the input
PARAGRAPH = "\n\n"  # ends a text too: one token of GPT-2's


def task_for(config: ConfigDict) -> Task | None:
  """E2E with its data; None where config.task has another name.

  Raises:
    UserError: the data can't be read; the message names file and line.
  """
  if config.task not in NAMES:
    return None
  train, valid, where = training_data(config)
  data, splits = config.data, {"train": train, "valid": valid}
  if data.prompt.count(INPUT) != 1:
    raise UserError(
      f"config.data.prompt is {data.prompt!r}; it needs one {INPUT}, where the"
      " input goes."
    )
  notes, write = [f"valid: {len(valid.texts)} rows of {where}"], None
  if data.test:
    check_installed()
    check_generate(config.generate.to_dict())
    groups = list(read_split(data.source, "test").grouped().items())
    most = data.max_eval_examples
    numbers = drawn(len(groups), most, seed=data.subset_seed)
    notes.append(f"test: {len(numbers)} of {len(groups)} inputs, at the end")
    write = partial(
      write_texts,
      groups=dict(groups[i] for i in numbers),
      prompt=data.prompt,
      settings=config.generate.to_dict(),
    )
  task = language_modelling(
    "e2e",
    read_split=lambda source, split: _examples(splits[split], data.prompt),
    dev_splits=("valid",),
    completions=Completions("right", data.separate),
    smoothing=config.optim.label_smoothing,
    presentation=Presentation(
      title="E2E",
      size=Size(len(train.texts), len(valid.texts), TOKENS),
      notes=tuple(notes),
    ),
  )
  return task._replace(
    selects=False,
    write_texts=write,
    stored={**task.stored, "prompt": data.prompt, "separate": data.separate},
  )


def check_generate(settings: dict[str, Any]) -> None:
  """Raises a UserError for settings by which no text would be written."""
  beam = dict(settings)
  for name in ("max_new_tokens", "rows"):
    if (value := beam.pop(name)) < 1:
      raise UserError(f"config.generate.{name} is {value}; 1 is the least.")
  try:
    Beam(**beam).check()
  except UserError as error:
    raise UserError(f"config.generate: {error}") from error


def training_data(config: ConfigDict) -> tuple[Pairs, Pairs, str]:
  """What is trained on, what is scored, and where the latter comes from.

  Raises:
    UserError: config.data names no folder, too few rows, or files that can't be
      read; the message names file and line.
  """
  if not config.get("data", {}).get("source"):
    raise UserError(
      "Name E2E's data: config.data.source=FOLDER, with train.txt, valid.txt"
      " and test.txt in microsoft/LoRA's form."
    )
  data = config.data
  most = data.max_eval_examples
  if most is not None and most < 1:
    raise UserError(f"config.data.max_eval_examples is {most}; 1 is the least.")
  train = read_split(data.source, "train")
  if data.held_out is None:
    valid, where = read_split(data.source, "valid"), "valid.txt"
  else:
    train, valid = hold_out(train, data.held_out, seed=data.subset_seed)
    where = (
      f"the first texts of {data.held_out} inputs of train.txt, none of which"
      " is trained on"
    )
  chosen = drawn(len(valid.texts), most, seed=data.subset_seed)
  return train, valid.take(chosen), where


def hold_out(rows: Pairs, inputs: int, *, seed: int) -> tuple[Pairs, Pairs]:
  """(the rest, the first text of each of some inputs).

  Args:
    rows: the training split's.
    inputs: how many inputs are kept apart, with all their rows.
    seed: what they are drawn from.

  Raises:
    UserError: there are not so many, or nothing would be left to train on.
  """
  groups = rows.grouped()
  if not 0 < inputs < len(groups):
    raise UserError(
      f"config.data.held_out is {inputs}; of the {len(groups)} inputs of"
      " train.txt, 1 or more are to be kept apart and 1 or more to be trained"
      " on."
    )
  names = list(groups)
  kept = [names[i] for i in drawn(len(names), inputs, seed=seed)]
  apart = set(kept)
  rest = [i for i, one in enumerate(rows.inputs) if one not in apart]
  return rows.take(rest), Pairs(kept, [groups[one][0] for one in kept])


def write_texts(
  model: Classifier,
  folder: Path,
  *,
  groups: dict[str, list[str]],
  prompt: str,
  settings: dict[str, Any],
) -> dict[str, Any]:
  """Answer inputs, score the answers, and keep them in `folder`/test.

  Args:
    model: the trained decoder.
    folder: the run's.
    groups: what people wrote for each input.
    prompt: config.data.prompt.
    settings: config.generate.

  Returns:
    For result.json: the scores, how many inputs and how long it took, and what
    is missing.

  Raises:
    UserError: none of the inputs can be answered.
  """
  started = time.monotonic()
  prompts = [prompt.replace(INPUT, one) for one in groups]
  texts, missing = generate(model, prompts, settings=settings)
  seconds = time.monotonic() - started
  inputs = list(groups)
  groups = {inputs[i]: groups[inputs[i]] for i in texts}
  write_written(folder, list(texts.values()), groups)
  scores = score_texts(list(texts.values()), list(groups.values()))
  return {
    "inputs": len(groups),
    "scores": scores.values,
    "missing": f"{missing} {scores.missing}".strip(),
    "seconds": seconds,
  }


def generate(
  model: Classifier, prompts: list[str], *, settings: dict[str, Any]
) -> tuple[dict[int, str], str]:
  """(a text for each prompt, by its number, why others have none).

  Texts are cut and stripped as microsoft/LoRA does it.

  Raises:
    UserError: none of the prompts has room in the model.
  """
  beam, started = dict(settings), time.monotonic()
  most, rows = beam.pop("max_new_tokens"), beam.pop("rows")
  generator = Generator(model, rows=rows)
  encoded, refused = {}, []
  for number, prompt in enumerate(prompts):
    try:
      encoded[number] = generator.encode(prompt, max_new_tokens=most)
    except UserError as error:
      refused.append(error)
  if refused and not encoded:
    raise refused[0]
  missing = ""
  if refused:
    missing = (
      f"{len(refused)} of {len(prompts)} inputs were not answered, the first"
      f" one for this reason: {refused[0]}"
    )
  paragraph = generator.tokenizer(PARAGRAPH, add_special_tokens=False)
  ends = generator.eos
  if len(paragraph["input_ids"]) == 1:
    ends = (*ends, *paragraph["input_ids"])
  with ProgressBar(steps=len(encoded), doing="test texts") as bar:
    answers = generator.ids(
      list(encoded.values()),
      how=Beam(**beam),
      max_new_tokens=most,
      eos=ends,
      progress=lambda done: _show(bar, done, of=len(encoded), since=started),
    )
  texts = [generator.decode(ids) for ids in answers]
  texts = [text.partition(PARAGRAPH)[0].strip() for text in texts]
  return dict(zip(encoded, texts, strict=True)), missing


def _show(bar: ProgressBar, done: int, *, of: int, since: float) -> None:
  """Moves the bar; in a log file, where none is shown, a line says it."""
  bar.advance(done)
  if not bar.console.is_terminal:
    left = (time.monotonic() - since) * (of - done) / done
    bar.log(f"test texts: {done} of {of}, {left:.0f} s left")


def _examples(rows: Pairs, prompt: str) -> Examples:
  """As microsoft/LoRA splits them into tokens: a text begins with a space."""
  return Examples(
    first=[prompt.replace(INPUT, one) for one in rows.inputs],
    second=[f" {text}" for text in rows.texts],
    labels=None,
    index=np.arange(len(rows.texts)),
  )
