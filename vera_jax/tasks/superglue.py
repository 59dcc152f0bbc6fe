"""Five of SuperGLUE's tasks: their facts, their files, and their form.

Facts of the benchmark (Wang et al., 2019), in the order of its leaderboard.
Label names stand in the order of the ids that the hub's `aps/super_glue` uses.
The tasks have the prefix "superglue_" here, since GLUE has an RTE too.

The first token's output is all that the head reads, so an example becomes one
text or pair, and COPA's becomes two:

  boolq   question | passage                            false, true
  cb      premise | hypothesis                          three classes
  copa    premise and question | choice, per choice     the higher score
  rte     premise | hypothesis                          two classes
  wic     "word: sentence1" | sentence2                 false, true

WiC's files also say where the word stands in each sentence. That is left out:
the word in front names it, also where a sentence has it in another form.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.examples import Examples
from vera_jax.errors import UserError
from vera_jax.files import BOM, parse_json, read_bytes
from vera_jax.tasks.classification import classification
from vera_jax.tasks.glue_data import LARGEST, local_folder
from vera_jax.tasks.glue_facts import ENTAILMENT, GlueTask
from vera_jax.tasks.glue_hub import download_rows
from vera_jax.tasks.task import Presentation, Size, Task, ToTexts

PREFIX = "superglue_"
FILES = {
  "train": "train.jsonl",
  "validation": "val.jsonl",
  "test": "test.jsonl",
}
# COPA's own wording of its two questions (Roemmele et al., 2011).
QUESTIONS = {
  "cause": "What was the cause of this?",
  "effect": "What happened as a result?",
}


def pair(first: str, second: str) -> list[tuple[str, ...]]:
  """The two texts as they are."""
  return [(first, second)]


def copa(
  premise: str, choice1: str, choice2: str, question: str
) -> list[tuple[str, ...]]:
  """The premise with the question, and each choice as its answer."""
  if question not in QUESTIONS:
    raise ValueError(f"question is {question!r}; it is cause or effect")
  asked = f"{premise} {QUESTIONS[question]}"
  return [(asked, choice1), (asked, choice2)]


def wic(word: str, sentence1: str, sentence2: str) -> list[tuple[str, ...]]:
  """Both sentences, with the word that they share in front."""
  return [(f"{word}: {sentence1}", sentence2)]


@dataclass(frozen=True)
class SuperGlueTask:
  """A task, as SuperGLUE's files and the hub write it.

  Attributes:
    glue: its names, columns, labels and metrics; `file_columns` are keys of
      SuperGLUE's JSON lines.
    values: the labels as the files write them, in the order of their ids.
    written: the labels as submissions write them, same order.
    to_texts: (texts of `glue.columns`) -> what the model reads.
    choices: whether the labels are choices, each scored as a text of its own.
    size: of the data as they are published; tokens by the length of the texts.
  """

  glue: GlueTask
  values: tuple[Any, ...]
  written: tuple[Any, ...]
  to_texts: ToTexts
  size: Size
  choices: bool = False


def _facts(
  name: str,
  folder: str,
  columns: tuple[str, ...],
  labels: tuple[str, ...],
  *,
  size: Size,
  to_texts: ToTexts = pair,
  values: tuple[Any, ...] = (),
  written: tuple[Any, ...] = (),
  metrics: tuple[str, ...] = ("accuracy",),
  choices: bool = False,
) -> SuperGlueTask:
  """Labels are written as they are named, unless `values` or `written` say."""
  glue = GlueTask(
    name,
    folder,
    columns=columns,
    file_columns=columns,
    file_label="label",
    labels=labels,
    written=labels,
    metrics=metrics,
    submissions=(f"{folder}.jsonl",),
  )
  values = values or labels
  return SuperGlueTask(glue, values, written or values, to_texts, size, choices)


_TRUTH = ("false", "true")
TASKS: dict[str, SuperGlueTask] = {
  PREFIX + facts.glue.name: facts
  for facts in (
    _facts(
      "boolq",
      "BoolQ",
      ("question", "passage"),
      _TRUTH,
      values=(False, True),
      written=_TRUTH,
      size=Size(9427, 3270, 150),
    ),
    _facts(
      "cb",
      "CB",
      ("premise", "hypothesis"),
      ("entailment", "contradiction", "neutral"),
      metrics=("accuracy_f1", "accuracy", "macro_f1"),
      size=Size(250, 56, 80),
    ),
    _facts(
      "copa",
      "COPA",
      ("premise", "choice1", "choice2", "question"),
      ("choice1", "choice2"),
      values=(0, 1),
      to_texts=copa,
      choices=True,
      size=Size(400, 100, 48),
    ),
    _facts(
      "rte",
      "RTE",
      ("premise", "hypothesis"),
      ENTAILMENT,
      size=Size(2490, 277, 70),
    ),
    _facts(
      "wic",
      "WiC",
      ("word", "sentence1", "sentence2"),
      _TRUTH,
      values=(False, True),
      written=_TRUTH,
      to_texts=wic,
      size=Size(5428, 638, 28),
    ),
  )
}
NAMES = tuple(TASKS)


def task_for(config: ConfigDict) -> Task | None:
  """A SuperGLUE task as the training loop knows tasks; None for another."""
  name = config.task
  if name not in TASKS:
    return None
  facts = TASKS[name]
  glue = facts.glue
  return classification(
    name,
    labels=() if facts.choices else glue.labels,
    metrics=glue.metrics,
    read_split=partial(load_split, facts),
    dev_splits=glue.dev_splits,
    test_splits=glue.test_splits,
    write_answers=lambda folder, split, predictions, index: write_submission(
      folder, facts, predictions, index
    ),
    to_texts=facts.to_texts,
    presentation=Presentation(
      title=f"SuperGLUE {glue.folder}",
      columns=(glue.columns,),
      choices=glue.labels if facts.choices else (),
      size=facts.size,
    ),
  )


def load_split(
  facts: SuperGlueTask, source: str | Path, split: str
) -> Examples:
  """Reads one split of a task.

  Args:
    facts: from `TASKS`.
    source: a hub id such as "aps/super_glue", or a folder that either holds
      `train.jsonl` itself or a folder of the task's name that does.
    split: "train", "validation" or "test".

  Raises:
    UserError: for a source that can't be reached or found, and for a file that
      isn't as SuperGLUE ships it; the message names file and line.
  """
  folder = local_folder(source)
  if folder is not None:
    return _read_split(facts, folder, split)
  columns, labels, index = download_rows(facts.glue, str(source), split)
  texts = []
  for number, row in enumerate(zip(*columns, strict=True)):
    try:
      texts.append(facts.to_texts(*row))
    except ValueError as error:
      place = f"{source} ({facts.glue.name}, {split})"
      raise UserError(f"{place}: row {number}: {error}.") from error
  return _examples(texts, labels, index)


def write_submission(
  folder: str | Path,
  facts: SuperGlueTask,
  predictions: np.ndarray,
  index: np.ndarray,
) -> Path:
  """Writes the test split's file for SuperGLUE's evaluation server.

  Args:
    folder: made when missing; all tasks' files go into one folder.
    predictions: [examples] class ids.
    index: [examples] the test file's own numbers.

  Returns:
    The file's path: CB.jsonl, say, with a line {"idx": …, "label": …} for each
    example.

  Raises:
    UserError: the file can't be written.
    ValueError: unequal lengths, or class ids below 0.
  """
  if (np.asarray(predictions) < 0).any():
    raise ValueError("class ids below 0")
  lines = [
    json.dumps({"idx": int(number), "label": facts.written[label]}) + "\n"
    for number, label in zip(index, predictions, strict=True)
  ]
  path = Path(folder).expanduser() / facts.glue.submissions[0]
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
  except OSError as error:
    raise UserError(f"{path} can't be written: {error.strerror}.") from error
  return path


def _read_split(facts: SuperGlueTask, folder: Path, split: str) -> Examples:
  inside = folder / facts.glue.folder
  path = (inside if inside.is_dir() else folder) / FILES[split]
  if not path.exists():
    raise UserError(
      f"{path} is missing. config.data.source takes a folder with"
      f" {', '.join(FILES.values())}, or its parent with these in"
      f" {facts.glue.folder}/."
    )
  data = read_bytes(path, inside=folder, limit=LARGEST)
  lines = data.removeprefix(BOM).split(b"\n")
  texts, labels, index = [], [], []
  for number, line in enumerate(lines, 1):
    if not line.strip() and number == len(lines):
      break  # what stands behind the last line's end
    try:
      row = _row(line)
      texts.append(
        facts.to_texts(*(_text(row, key) for key in facts.glue.columns))
      )
      if split == "test":
        index.append(_number(row))
      else:
        labels.append(_label(facts, row))
    except ValueError as error:
      raise UserError(f"{path}:{number}: {error}.") from error
  if not texts:
    raise UserError(f"{path}: the file has no examples.")
  if split == "test":
    return _examples(texts, None, np.array(index, np.int64))
  return _examples(texts, np.array(labels, np.int32), np.arange(len(texts)))


def _examples(
  texts: list[list[tuple[str, ...]]],
  labels: np.ndarray | None,
  index: np.ndarray,
) -> Examples:
  """One entry of `texts` per example, with a pair per choice."""
  pairs: Iterable[tuple[str, ...]] = chain.from_iterable(texts)
  first, second = map(list, zip(*pairs, strict=True))
  return Examples(first, second, labels, index, choices=len(texts[0]))


def _row(line: bytes) -> dict[str, Any]:
  """A line's JSON object; a ValueError where it is none."""
  try:
    row = parse_json(line)
  except UnicodeDecodeError as error:
    raise ValueError("the line is not UTF-8") from error
  except UnicodeEncodeError as error:  # JSON can hold half a character
    raise ValueError("a text holds half a character") from error
  except ValueError as error:
    raise ValueError(f"the line is no JSON ({error})") from error
  if not isinstance(row, dict):
    raise ValueError("the line is no JSON object")
  return row


def _text(row: dict[str, Any], key: str) -> str:
  """A key's text; a ValueError where there is none."""
  if key not in row:
    raise ValueError(f"there is no {key!r}; the keys are {', '.join(row)}")
  if not isinstance(row[key], str):
    raise ValueError(f"{key!r} is no text but {row[key]!r}")
  return row[key]


def _number(row: dict[str, Any]) -> int:
  """The number by which a submission names the example."""
  number = row.get("idx")
  # True is an int as well
  if type(number) is not int or not 0 <= number < 2**63:
    raise ValueError(f"idx {number!r} is not a whole number below 2**63")
  return number


def _label(facts: SuperGlueTask, row: dict[str, Any]) -> int:
  """The id of a row's label."""
  label = row.get("label")
  for id, value in enumerate(facts.values):
    if type(label) is type(value) and label == value:
      return id
  shown = json.dumps(label) if "label" in row else "missing"
  known = ", ".join(map(json.dumps, facts.values))
  raise ValueError(f"the label is {shown}; the labels are {known}")
