"""Five of SuperGLUE's tasks: their facts, and what the model reads of them.

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

from typing import Any

from ml_collections import ConfigDict

from vera_jax.tasks.glue import benchmark_task
from vera_jax.tasks.glue_facts import ENTAILMENT, GlueTask
from vera_jax.tasks.task import Size, Task, ToTexts

PREFIX = "superglue_"
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


def _facts(
  name: str,
  folder: str,
  columns: tuple[str, ...],
  labels: tuple[str, ...],
  *,
  size: Size,
  to_texts: ToTexts = pair,
  written: tuple[Any, ...] = (),
  submitted: tuple[Any, ...] = (),
  metrics: tuple[str, ...] = ("accuracy",),
  choices: bool = False,
) -> GlueTask:
  """A task as SuperGLUE's files and the hub write it.

  Files and submissions have labels as `labels` names them, unless `written` or
  `submitted` say otherwise.
  """
  return GlueTask(
    name,
    folder,
    columns=columns,
    file_columns=columns,
    file_label="label",
    labels=labels,
    written=written or labels,
    submitted=submitted or written or labels,
    metrics=metrics,
    submissions=(f"{folder}.jsonl",),
    json_lines=True,
    to_texts=to_texts,
    choices=choices,
    size=size,
  )


_TRUTH = ("false", "true")
TASKS: dict[str, GlueTask] = {
  PREFIX + facts.name: facts
  for facts in (
    _facts(
      "boolq",
      "BoolQ",
      ("question", "passage"),
      _TRUTH,
      written=(False, True),
      submitted=_TRUTH,
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
      written=(0, 1),
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
      written=(False, True),
      submitted=_TRUTH,
      to_texts=wic,
      size=Size(5428, 638, 28),
    ),
  )
}
NAMES = tuple(TASKS)


def task_for(config: ConfigDict) -> Task | None:
  """A SuperGLUE task as the training loop knows tasks; None for another."""
  facts = TASKS.get(config.task)
  if facts is None:
    return None
  title = f"SuperGLUE {facts.folder}"
  return benchmark_task(config.task, facts, title=title)
