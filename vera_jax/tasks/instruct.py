"""Instruction tuning (the paper's Table 4), scored without a judge.

Answers are learned, questions are not. The score is that of language modelling
on rows that are held out: the geometric mean of the right tokens'
probabilities, with loss, perplexity and next-token accuracy beside it. At a
run's end some of these rows are answered greedily and compared with their
answers by ROUGE-L, and questions with choices may be asked.

ROUGE-L is rouge-score's, which is a Python port of the original made for
publications, as instruction tuning's papers report it. Its words are runs of a
to z and 0 to 9 in lower-cased texts: "schön" is two of them, and a text in
another alphabet has none. E2E's is COCO's, whose words come from a Java program
and which takes the best of several references.
"""

import importlib.util
import json
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.answers import Answers
from vera_jax.data.examples import Examples, drawn, estimated_tokens
from vera_jax.data.templates import CHAT, PLAIN, TEMPLATES
from vera_jax.data.written import FOLDER, write_written
from vera_jax.errors import UserError, install
from vera_jax.files import write_text
from vera_jax.generate.choices import (
  ChoiceQuestion,
  answer_questions,
  read_choices,
)
from vera_jax.generate.conversation import conversation_ids
from vera_jax.generate.generator import Generator
from vera_jax.pretrained.classifier import Classifier
from vera_jax.progress import ProgressBar
from vera_jax.tasks.instruct_files import (
  Instruction,
  as_text,
  read_splits,
)
from vera_jax.tasks.language_files import general_texts
from vera_jax.tasks.language_modelling import language_modelling
from vera_jax.tasks.task import Presentation, Size, Task

NAMES = ("instruct",)


def task_for(config: ConfigDict) -> Task | None:
  """Instruction tuning with its data; None where config.task has another name.

  Raises:
    UserError: the data can't be read; the message names file and line.
  """
  if config.task not in NAMES:
    return None
  if "data" not in config:
    raise UserError(f"The task {config.task!r} needs the data to be known.")
  data = config.data
  if data.template not in TEMPLATES:
    raise UserError(
      f"config.data.template is {data.template!r}; choose"
      f" {', '.join(TEMPLATES)}."
    )
  generate = config.generate
  for name, value, least in (
    ("data.max_test_examples", data.max_test_examples, 0),
    ("generate.max_new_tokens", generate.max_new_tokens, 1),
    ("generate.rows", generate.rows, 1),
  ):
    if value < least:
      raise UserError(f"config.{name} is {value}; {least} is the least.")
  if data.max_test_examples:
    check_installed()
  splits = read_splits(data)
  examples = {
    "train": as_examples(splits.train, data.template),
    "dev": as_examples(splits.dev, data.template),
  }
  chosen = drawn(len(splits.dev), data.max_test_examples, seed=data.subset_seed)
  tests = [splits.dev[i] for i in chosen]
  choices = read_choices(data.choices)
  write = partial(
    write_texts,
    rows=tests,
    template=data.template,
    settings=generate.to_dict(),
    choices=choices,
  )
  notes = [
    f"rows: {splits.schema}, put into the template {data.template!r}; learned:"
    " the answers",
    f"dev: {splits.where}",
    *splits.notes,
  ]
  if tests:
    notes.append(f"test: {len(tests)} of these rows answered at the end")
  for name, questions in choices.items():
    notes.append(f"choices: {len(questions)} questions of {name} at the end")
  contents = (m["content"] for row in splits.train for m in row.messages)
  task = language_modelling(
    f"instruct:{splits.name}",
    read_split=lambda source, split: examples[split],
    dev_splits=("dev",),
    completions=Answers(data.template),
    smoothing=config.optim.label_smoothing,
    general=general_texts(data),
    presentation=Presentation(
      title="Instructions",
      size=Size(
        len(splits.train),
        len(splits.dev),
        estimated_tokens(contents, len(splits.train)),
      ),
      notes=tuple(notes),
    ),
  )
  return task._replace(
    write_texts=write if tests or choices else None,
    stored={**task.stored, **splits.stored, "template": data.template},
  )


def check_installed() -> None:
  """Raises a UserError where ROUGE-L can't be computed."""
  if importlib.util.find_spec("rouge_score") is None:
    raise UserError(
      f"ROUGE-L of a run's answers needs rouge-score: {install('instruct')}, or"
      " --config.data.max_test_examples=0 to answer nothing."
    )


def as_examples(rows: Sequence[Instruction], template: str) -> Examples:
  """What `Answers(template)` reads."""
  index = np.array([row.number for row in rows])
  places = [row.place for row in rows]
  if template == CHAT:
    messages = [json.dumps(row.messages, ensure_ascii=False) for row in rows]
    return Examples(messages, None, None, index, places=places)
  pairs = [as_text(row, template) for row in rows]
  prompts, answers = ([pair[side] for pair in pairs] for side in (0, 1))
  return Examples(prompts, answers, None, index, places=places)


def write_texts(
  model: Classifier,
  folder: Path,
  *,
  rows: Sequence[Instruction],
  template: str,
  settings: dict[str, Any],
  choices: dict[str, list[ChoiceQuestion]],
) -> dict[str, Any]:
  """Answer rows and questions, score the answers, and keep them in a folder.

  Args:
    model: the trained decoder.
    folder: the run's; the answers are in its folder "test".
    rows: the rows to be answered.
    template: config.data.template.
    settings: config.generate.
    choices: questions by their name.

  Returns:
    For result.json: the scores, how many rows and how long it took, and why
    scores are missing, if some are.

  Raises:
    UserError: as for `Generator.ids`.
  """
  started = time.monotonic()
  scores: dict[str, float] = {}
  missing = []
  if rows:
    answers, why = _answer(model, rows, template, settings)
    missing += [why] if why else []
    rows = [row for row in rows if row.number in answers]
    _keep(folder, rows, answers)
    references = [row.answer for row in rows]
    if any(re.search("[a-z0-9]", text.lower()) for text in references):
      scores["ROUGE_L"] = rouge_l(
        [answers[row.number] for row in rows], references
      )
    elif rows:
      missing.append(
        "There is no ROUGE_L, which knows words of the letters a to z and"
        " figures alone: the test rows' own answers have none."
      )
  for name, questions in choices.items():
    total = sum(len(question.choices) for question in questions)
    try:
      with ProgressBar(steps=total, doing=name) as bar:
        accuracy = answer_questions(model, questions, progress=bar.advance)
    except UserError as error:  # what else was found out is kept
      missing.append(f"{name} was not scored: {error}")
      continue
    scores[f"{name} accuracy"] = accuracy.plain
    scores[f"{name} accuracy, normalised"] = accuracy.normalised
  return {
    "inputs": len(rows),
    "scores": scores,
    "missing": " ".join(missing),
    "seconds": time.monotonic() - started,
  }


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
  """The mean over answers of ROUGE-L's F1, a share.

  Words are lower-cased and not stemmed. Only a to z and 0 to 9 make words, and
  all else parts them; a pair in which one side has none counts as 0.
  """
  from rouge_score.rouge_scorer import RougeScorer

  scorer = RougeScorer(["rougeL"], use_stemmer=False)
  pairs = zip(references, answers, strict=True)
  return float(
    np.mean([scorer.score(*pair)["rougeL"].fmeasure for pair in pairs])
  )


def _answer(
  model: Classifier,
  rows: Sequence[Instruction],
  template: str,
  settings: dict[str, Any],
) -> tuple[dict[int, str], str]:
  """(each row's answer by its number, why others have none)."""
  most = settings["max_new_tokens"]
  generator = Generator(model, rows=settings["rows"])
  prompts = {}
  for row in rows:
    if template == CHAT:
      messages: Any = row.messages[:-1]
      ids = conversation_ids(generator.tokenizer, messages, template=template)
    else:
      prompt, _ = as_text(row, template)
      messages = [{"role": "user", "content": prompt}]
      ids = conversation_ids(generator.tokenizer, messages, template=PLAIN)
    if len(ids) + most <= model.room:
      prompts[row.number] = ids
  with ProgressBar(steps=len(prompts), doing="test answers") as bar:
    answers = generator.ids(
      list(prompts.values()), max_new_tokens=most, progress=bar.advance
    )
  texts = [generator.decode(ids).strip() for ids in answers]
  left = len(rows) - len(prompts)
  missing = ""
  if left:
    missing = (
      f"{left} of {len(rows)} test rows were not answered: with {most} new"
      f" tokens their questions are longer than the model's {model.room}."
    )
  return dict(zip(prompts, texts, strict=True)), missing


def _keep(
  folder: Path, rows: Sequence[Instruction], answers: dict[int, str]
) -> None:
  """answers.jsonl as they are, and the files that reports read, in lines."""
  groups: dict[str, list[str]] = {}
  outputs: dict[str, str] = {}
  lines = []
  for row in rows:
    answer = answers[row.number]
    asked = " / ".join(m["content"] for m in row.messages[:-1])
    asked = " ".join(asked.split())
    groups.setdefault(asked, []).append(" ".join(row.answer.split()))
    outputs[asked] = answer
    line = {
      "row": row.number + 1,
      "messages": row.messages[:-1],
      "answer": answer,
      "reference": row.answer,
    }
    lines.append(json.dumps(line, ensure_ascii=False) + "\n")
  write_written(folder, list(outputs.values()), groups)
  write_text(folder / FOLDER / "answers.jsonl", "".join(lines))
