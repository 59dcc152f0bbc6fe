"""Answers to MT-Bench's and Vicuna's questions, for whoever judges them later.

Questions and answers are files of JSON lines in the form of FastChat
(github.com/lm-sys/FastChat, fastchat/llm_judge):

  question  {"question_id", "category", "turns": ["…", "…"]}
            of Vicuna's also {"question_id", "category", "text": "…"}
  answer    {"question_id", "answer_id", "model_id", "choices": [{"index": 0,
            "turns": ["…", "…"]}], "tstamp"}

A second turn is asked with the model's own first answer before it. No score is
made up here.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.data.tables import read_table
from vera_jax.errors import UserError
from vera_jax.generate.sampling import GREEDY, Sampling
from vera_jax.serve.generator import Generator
from vera_jax.tasks.instruct import prompt_ids

# By category, as FastChat's llm_judge/common.py has them; others have OTHERS.
TEMPERATURES = {
  "writing": 0.7,
  "roleplay": 0.7,
  "extraction": 0.0,
  "math": 0.0,
  "coding": 0.0,
  "reasoning": 0.0,
  "stem": 0.1,
  "humanities": 0.1,
}
OTHERS = 0.7


class Question(NamedTuple):
  """A question of one or more turns."""

  id: Any
  category: str
  turns: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
  """The questions of a file.

  Raises:
    UserError: it can't be read, or a line is no question; the message names it.
  """
  table = read_table(path)
  columns, questions = table.columns, []
  for number in range(len(table.numbers)):
    row = {name: values[number] for name, values in columns.items()}
    turns = row.get("turns") or [row.get("text")]
    if (
      row.get("question_id") is None
      or not isinstance(turns, list)
      or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
      raise UserError(
        f'{table.place(number)}: a question has "question_id" and "turns", a'
        ' list of texts (or one, "text").'
      )
    category = str(row.get("category") or "")
    questions.append(Question(row["question_id"], category, tuple(turns)))
  return questions


def answer_turns(
  generator: Generator,
  questions: Sequence[Question],
  *,
  template: str,
  greedy: bool = False,
  max_new_tokens: int = 1024,
  seed: int = 0,
  progress: Callable[[int], None] | None = None,
) -> list[list[str]]:
  """The answers to all turns of each question.

  Args:
    generator: of the model that is asked.
    questions: those to answer.
    template: as config.data.template.
    greedy: take the likeliest word each time, whatever the category.
    max_new_tokens: the most tokens of an answer.
    seed: of what is drawn.
    progress: called with the number of turns answered so far.

  Raises:
    UserError: a question has no room in the model; the message names it.
  """
  answers: list[list[str]] = [[] for _ in questions]
  done = 0
  for turn in range(max((len(q.turns) for q in questions), default=0)):
    asked = [i for i, q in enumerate(questions) if len(q.turns) > turn]
    prompts = {}
    for i in asked:
      messages = []
      for question, answer in zip(
        questions[i].turns, [*answers[i], None], strict=False
      ):
        messages.append({"role": "user", "content": question})
        if answer is not None:
          messages.append({"role": "assistant", "content": answer})
      ids = prompt_ids(generator.tokenizer, messages, template=template)
      try:
        generator.check(ids, max_new_tokens=max_new_tokens)
      except UserError as error:
        raise UserError(
          f"Question {questions[i].id}, turn {turn + 1}: {error}"
        ) from error
      prompts[i] = ids
    heats = {
      i: 0.0 if greedy else TEMPERATURES.get(questions[i].category, OTHERS)
      for i in asked
    }
    for heat in sorted({*heats.values()}):
      own = [i for i in asked if heats[i] == heat]
      found = generator.ids(
        [prompts[i] for i in own],
        how=Sampling(heat) if heat else GREEDY,
        max_new_tokens=max_new_tokens,
        # turns of a question draw by keys of their own
        numbers=[turn * len(questions) + i for i in own],
        seed=seed,
      )
      done += len(own)
      if progress is not None:
        progress(done)
      for i, ids in zip(own, found, strict=True):
        answers[i].append(generator.decode(ids).strip())
  return answers


def as_line(question: Question, turns: list[str], *, model_id: str) -> dict:
  """A line of FastChat's file of answers."""
  return {
    "question_id": question.id,
    "answer_id": uuid.uuid4().hex,
    "model_id": model_id,
    "choices": [{"index": 0, "turns": turns}],
    "tstamp": time.time(),
  }
