"""Answers to MT-Bench's and Vicuna's questions, for whoever judges them later.

Questions and answers are files of JSON lines in the form of FastChat
(github.com/lm-sys/FastChat, fastchat/llm_judge):

  question  {"question_id", "category", "turns": ["…", "…"]}
            of Vicuna's also {"question_id", "category", "text": "…"}
  answer    {"question_id", "answer_id", "model_id", "choices": [{"index": 0,
            "turns": ["…", "…"]}], "tstamp"}

A second turn is asked with the model's own first answer before it. No score is
computed here.
"""

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.data.tables import read_table
from vera_jax.errors import UserError
from vera_jax.generate.conversation import conversation_ids
from vera_jax.generate.generator import Generator
from vera_jax.generate.sampling import GREEDY, Sampling

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


class JudgeQuestion(NamedTuple):
  """A question of one or more turns."""

  id: Any
  category: str
  turns: tuple[str, ...]


def read_judge_questions(path: str | Path) -> list[JudgeQuestion]:
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
    questions.append(JudgeQuestion(row["question_id"], category, tuple(turns)))
  return questions


class AnsweredTurns(NamedTuple):
  """The answers to a question's turns.

  Attributes:
    turns: a text for each; "" where there was no room for any.
    shortened: how many turns had room for fewer new tokens than were allowed,
      or for none.
  """

  turns: list[str]
  shortened: int


def answer_turns(
  generator: Generator,
  questions: Sequence[JudgeQuestion],
  *,
  greedy: bool = False,
  max_new_tokens: int = 1024,
  seed: int = 0,
) -> Iterator[AnsweredTurns]:
  """The answers to all turns of each question, as soon as it has them.

  Neighbours of one temperature are answered together, `generator.rows` at a
  time. A second turn has the first one's answer before it and may have less
  room than that: its answer is shorter then.

  Args:
    generator: the model that is asked, with the template for questions.
    questions: those to answer.
    greedy: take the likeliest word each time, whatever the category.
    max_new_tokens: the most tokens of an answer.
    seed: the seed of the words that are drawn.

  Raises:
    UserError: as for `conversation_ids` and `Generator.ids`.
  """

  def temperature(i: int) -> float:
    return 0.0 if greedy else TEMPERATURES.get(questions[i].category, OTHERS)

  batches = []
  for value, same in groupby(range(len(questions)), key=temperature):
    neighbours = list(same)
    for start in range(0, len(neighbours), generator.rows):
      batches.append((value, neighbours[start : start + generator.rows]))
  for value, batch in batches:
    answers = {i: AnsweredTurns([], 0) for i in batch}
    for turn in range(max(len(questions[i].turns) for i in batch)):
      by_room: dict[int, dict[int, list[int]]] = defaultdict(dict)
      for i in batch:
        if len(questions[i].turns) <= turn:
          continue
        ids = _prompt(generator, questions[i], answers[i].turns)
        room = max(0, generator.decoder.room - len(ids))
        if room < max_new_tokens:
          answers[i] = answers[i]._replace(shortened=answers[i].shortened + 1)
        by_room[min(room, max_new_tokens)][i] = ids
      for i in by_room.pop(0, {}):
        answers[i].turns.append("")
      for room, prompts in by_room.items():
        answered = generator.ids(
          list(prompts.values()),
          how=Sampling(value) if value else GREEDY,
          max_new_tokens=room,
          # turns of a question draw by keys of their own
          numbers=[turn * len(questions) + i for i in prompts],
          seed=seed,
        )
        for i, ids in zip(prompts, answered, strict=True):
          answers[i].turns.append(generator.decode(ids).strip())
    yield from answers.values()


def _prompt(
  generator: Generator, question: JudgeQuestion, answers: Sequence[str]
) -> list[int]:
  """The tokens of a question's next turn, behind the turns before it."""
  messages = []
  for asked, answer in zip(question.turns, [*answers, None], strict=False):
    messages.append({"role": "user", "content": asked})
    if answer is not None:
      messages.append({"role": "assistant", "content": answer})
  return conversation_ids(
    generator.tokenizer, messages, template=generator.template
  )


def as_line(
  question: JudgeQuestion, turns: list[str], *, model_id: str
) -> dict:
  """A line of FastChat's file of answers."""
  return {
    "question_id": question.id,
    "answer_id": uuid.uuid4().hex,
    "model_id": model_id,
    "choices": [{"index": 0, "turns": turns}],
    "tstamp": time.time(),
  }
