"""Instructions and their answers, from files or the hub.

A table's columns say which of four schemas its rows have:

  messages                      a conversation: a list of {"role", "content"}
  conversations                 ShareGPT's: a list of {"from", "value"}
  instruction (input), output   Alpaca's
  prompt, completion            two texts

A column `system` is a text before all of them, and beside Alpaca's columns or a
prompt `history` has the earlier turns, a list of [question, answer].

Whatever the schema, `rows_of` gives a prompt and its answer, and the
conversation that they are. Which of them a model reads is
config.data.template's choice.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.chat import ASSISTANT
from vera_jax.data.examples import drawn
from vera_jax.data.tables import SUFFIXES, Table, some
from vera_jax.data.templates import ALPACA, alpaca_prompt
from vera_jax.errors import UserError
from vera_jax.files import parse_json
from vera_jax.places import local_copy
from vera_jax.tasks.own_rows import skip_bad_rows
from vera_jax.tasks.text_files import read_tables

# The columns that a table of each schema has; others are left alone.
SCHEMAS = {
  "messages": ("messages",),
  "sharegpt": ("conversations",),
  "alpaca": ("instruction", "output"),
  "completion": ("prompt", "completion"),
}
ROLES = ("system", "user", ASSISTANT)
# For each schema of conversations the names of a message's two fields, and of
# the roles where these are others.
TURNS: dict[str, tuple[str, str, dict[str, str]]] = {
  "messages": ("role", "content", {}),
  "sharegpt": ("from", "value", {"human": "user", "gpt": ASSISTANT}),
}
# What would change a question or what is learned, and is not read: columns of
# a row, and fields of a message.
UNREAD = ("tools",)
UNREAD_IN_MESSAGES = (
  "tool_calls",
  "reasoning_content",
  "reasoning",
  "thinking",
)


class Instruction(NamedTuple):
  """One example in every way that it can be read.

  Attributes:
    number: the row's number in its table, from 0.
    messages: the conversation, which ends with an answer.
    instruction, input: those of a single question; "" where there is no input,
      and None where the conversation is no single question and answer.
    place: file and line, or file and row, for messages.
  """

  number: int
  messages: list[dict[str, Any]]
  instruction: str | None = None
  input: str = ""
  place: str = ""

  @property
  def answer(self) -> str:
    """The last one."""
    return self.messages[-1]["content"]

  @property
  def opening(self) -> str:
    """What comes before the first answer: equal for the same first question.

    An answer before any question, such as a greeting, is part of it.
    """
    roles = [message["role"] for message in self.messages]
    asked = roles.index("user") if "user" in roles else 0
    first = roles.index(ASSISTANT, asked)
    return json.dumps(self.messages[:first], ensure_ascii=False)


class Splits(NamedTuple):
  """The rows of a run.

  Attributes:
    name: the data's name.
    schema: a name in `SCHEMAS`.
    train, dev: rows that are trained on, and that are scored.
    where: where the dev rows come from, in a sentence.
    stored, notes: what `skip_bad_rows` returns of the rows that are left out.
  """

  name: str
  schema: str
  train: list[Instruction]
  dev: list[Instruction]
  where: str
  stored: dict[str, Any]
  notes: tuple[str, ...]


def read_splits(data: ConfigDict) -> Splits:
  """The rows that config.data names, of which some are held out.

  Raises:
    UserError: they can't be read, have none of the forms, or are too few; the
      message names file and line.
  """
  if not data.source:
    raise UserError(
      "Name the data: config.data.source=NAME, a hub id, a folder with train"
      f" and dev files, or a file with a name in {', '.join(SUFFIXES)}."
    )
  path = local_copy(data.source)
  if path.suffix.lower() in SUFFIXES and not path.is_file():
    raise UserError(f"There is no file {path} (config.data.source).")
  named = {"source": data.source, "train": None, "dev": data.dev}
  if path.is_file():
    named |= {"source": None, "train": str(path)}
  name, table, dev_table = read_tables(ConfigDict(named))
  schema, others = schema_of(table), None
  table, train = rows_of(table, schema)
  if dev_table is not None:
    dev_table, others = rows_of(dev_table, schema_of(dev_table))
  stored, notes = skip_bad_rows({"train": table, "dev": dev_table}, data)
  most = data.max_eval_examples
  train, dev, where = _hold_out(
    train, others, data, dev_name=dev_table.name if dev_table else ""
  )
  if most is not None and most < len(dev):
    dev = [dev[i] for i in drawn(len(dev), most, seed=data.subset_seed)]
    where += f", {most} of them (config.data.max_eval_examples)"
  return Splits(name, schema, train, dev, where, stored, tuple(notes))


def schema_of(table: Table) -> str:
  """The name in `SCHEMAS` of what a table's columns are.

  Raises:
    UserError: the columns are those of none of them, or of several.
  """
  fitting = [
    name for name, columns in SCHEMAS.items() if {*columns} <= {*table.columns}
  ]
  if len(fitting) == 1:
    return fitting[0]
  wanted = "; or ".join(" and ".join(names) for names in SCHEMAS.values())
  many = (
    "those of more than one form" if fitting else "not those of instructions"
  )
  raise UserError(
    f"{table.name}: the columns {some(table.columns)} are {many}. There"
    f" must be {wanted}."
  )


def rows_of(table: Table, schema: str) -> tuple[Table, list[Instruction]]:
  """A table's rows, and the table of those that can be used."""
  columns = table.columns

  def text(name: str, number: int, *, may_be_empty: bool = False) -> str:
    value = columns[name][number] if name in columns else ""
    if value is None and may_be_empty:
      value = ""
    if not isinstance(value, str):
      raise UserError(f"{table.place(number)}: {name} is no text: {value!r}.")
    if not may_be_empty and not value.strip():
      raise UserError(f"{table.place(number)}: {name} is empty.")
    return value

  def read(number: int) -> Instruction:
    place = table.place(number)
    unread = UNREAD if schema not in TURNS else (*UNREAD, "history")
    for name in unread:
      if name in columns and not _is_empty(columns[name][number]):
        raise UserError(
          f"{place}: the column {name} would change what is asked, but is not"
          " read. Write earlier turns into the conversation, or leave the"
          " column out."
        )
    system = text("system", number, may_be_empty=True)
    opening = [{"role": "system", "content": system}] if system.strip() else []
    if schema in TURNS:
      (column,) = SCHEMAS[schema]
      messages = _messages(columns[column][number], place, schema)
      if opening and messages[0]["role"] == "system":
        raise UserError(
          f"{place}: there is a system text in the column system, and another"
          f" in {column}. Leave one of them out."
        )
      messages = opening + messages
      single = [m["role"] for m in messages] == ["user", ASSISTANT]
      instruction = messages[0]["content"] if single else None
      return Instruction(number, messages, instruction, place=place)
    question, answer = SCHEMAS[schema]
    instruction, more = text(question, number), ""
    if schema == "alpaca":
      more = text("input", number, may_be_empty=True)
    content = f"{instruction}\n\n{more}" if more.strip() else instruction
    history = columns["history"][number] if "history" in columns else None
    earlier = _history(history, place)
    messages = [
      *opening,
      *earlier,
      {"role": "user", "content": content},
      {"role": ASSISTANT, "content": text(answer, number)},
    ]
    if opening or earlier:  # no single question
      return Instruction(number, messages, None, place=place)
    return Instruction(number, messages, instruction, more, place)

  return table.read_each(read)


def _as_list(value: Any) -> list[Any] | None:
  """A list, also one that is written as JSON; None for anything else."""
  if isinstance(value, str):
    try:
      value = parse_json(value)
    except ValueError:
      return None
  return value if isinstance(value, list) else None


def _history(value: Any, place: str) -> list[dict[str, Any]]:
  """The messages of earlier turns, a list of [question, answer]."""
  if _is_empty(value):
    return []
  turns = _as_list(value)
  if not turns or not all(
    isinstance(turn, list)
    and len(turn) == 2
    and all(isinstance(text, str) and text.strip() for text in turn)
    for turn in turns
  ):
    raise UserError(
      f"{place}: history is no list of [question, answer], each a text."
    )
  return [
    {"role": role, "content": text}
    for turn in turns
    for role, text in zip(("user", ASSISTANT), turn, strict=True)
  ]


def _messages(value: Any, place: str, schema: str) -> list[dict[str, Any]]:
  """A conversation up to its last answer; behind that nothing is learned."""
  (column,), (role_field, text_field, names) = SCHEMAS[schema], TURNS[schema]
  form = f'{{"{role_field}": …, "{text_field}": …}}'
  value = _as_list(value)
  if not value:
    raise UserError(f"{place}: {column} is no list of {form}.")
  messages = []
  for number, message in enumerate(value, 1):
    here = f"{place}: message {number}"
    if not isinstance(message, dict):
      raise UserError(f"{here} is no {form}.")
    role, content = message.get(role_field), message.get(text_field)
    role = names.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
      known = ", ".join((*names, *ROLES))
      raise UserError(
        f"{here}: its {role_field} is {role!r}; it is one of {known}."
      )
    if not isinstance(content, str) or not content.strip():
      what = "empty" if isinstance(content, str) else f"no text: {content!r}"
      raise UserError(f"{here}: the {text_field} is {what}.")
    for name in UNREAD_IN_MESSAGES:
      if not _is_empty(message.get(name)):
        raise UserError(
          f"{here}: the field {name} would change what is learned, but is not"
          " read. Leave it out, or the row."
        )
    weight = message.get("weight")
    if role == ASSISTANT and weight not in (None, 1):
      raise UserError(
        f"{here}: the weight is {weight!r}, but every answer is learned alike."
        " Leave it out, or the row."
      )
    messages.append({"role": role, "content": content})
  while messages and messages[-1]["role"] != ASSISTANT:
    messages.pop()
  if len(messages) < 2 or all(m["role"] == ASSISTANT for m in messages):
    raise UserError(
      f"{place}: there is no answer of the {ASSISTANT} to anything in {column}."
    )
  return messages


def _is_empty(value: Any) -> bool:
  """Whether a column or field says nothing, also as JSON in a text."""
  if isinstance(value, str):
    return value.strip() in ("", "[]", "{}", "null")
  return not value


def as_text(row: Instruction, template: str) -> tuple[str, str]:
  """(prompt, answer) by the template "alpaca" or "plain".

  Raises:
    UserError: the row is a conversation that is no single question.
  """
  if row.instruction is None:
    raise UserError(
      f"{row.place}: this is a conversation of {len(row.messages)} messages."
      f" config.data.template={template} can put one question and its answer"
      " alone: choose chat, with a model whose tokenizer has a chat template."
    )
  if template == ALPACA:
    return alpaca_prompt(row.instruction, row.input), row.answer
  prompt = row.instruction
  if row.input.strip():
    prompt += f"\n\n{row.input}"
  return prompt, row.answer


def _hold_out(
  rows: Sequence[Instruction],
  others: Sequence[Instruction] | None,
  data: ConfigDict,
  *,
  dev_name: str,
) -> tuple[list[Instruction], list[Instruction], str]:
  """(rows to train on, rows to score, where these come from).

  Without `others` to score, which come from `dev_name`, `dev_examples`
  questions are drawn by seed. After them `tuning_examples` are drawn for
  choosing settings by, which are scored in place of the first ones, or of the
  others, where `tune` says so. No run trains on a row with a question that is
  drawn, and no question of the others is drawn. Of a question that several rows
  have, the first one is scored. The question of a conversation is its first
  one: the answers behind it may be those of another row.
  """
  groups: dict[str, list[Instruction]] = {}
  for row in rows:
    groups.setdefault(row.opening, []).append(row)
  dev, tuning = data.dev_examples, data.tuning_examples
  if others is not None:
    dev = 0
  asked = {row.opening for row in others or ()}
  keys = [key for key in groups if key not in asked]
  if tuning < 0 or (others is None and (dev < 1 or len(groups) < 2)):
    raise UserError(
      f"config.data.dev_examples is {dev} and tuning_examples {tuning}; of the"
      f" {len(groups)} different questions 1 or more are to be scored, and 1 or"
      " more to be trained on. Or name a file to score: config.data.dev=FILE."
    )
  shrunk = ""
  if dev + tuning > min(len(keys), len(groups) - 1):
    # Of a small file half is held out, in the same proportion; few rows to be
    # scored aren't made fewer for the sake of those that nobody may score.
    apart_at_most = min(len(keys), len(groups) // 2)
    asked_for = {"dev_examples": dev, "tuning_examples": tuning}
    proportion = apart_at_most * dev // (dev + tuning)
    dev = dev and max(1, proportion, min(dev, apart_at_most // 2))
    tuning = apart_at_most - dev
    shrunk = "; fewer are held out than config.data says, for there are only"
    shrunk += f" {len(groups)} different questions: " + ", ".join(
      f"{name} {now} in place of {before}"
      for (name, before), now in zip(
        asked_for.items(), (dev, tuning), strict=True
      )
      if now != before
    )
  if data.tune and not tuning:
    raise UserError(
      "config.data.tune scores config.data.tuning_examples, of which there are"
      " none: say how many."
    )
  order = np.random.default_rng(data.subset_seed).permutation(len(keys))
  apart = {keys[i] for i in order[: dev + tuning]}
  rest = [row for row in rows if row.opening not in apart]
  if others is not None and not data.tune:
    where = f"{len(others)} rows of {dev_name}"
    if same := len(asked & {row.opening for row in rest}):
      where += f"; {same} of their first questions are trained on as well"
    if tuning:
      where += (
        f"; {tuning} questions are kept from training for config.data.tune"
        " (config.data.tuning_examples)"
      )
    return rest, [*others], where + shrunk
  scored = order[dev : dev + tuning] if data.tune else order[:dev]
  kept = sorted((groups[keys[i]][0] for i in scored), key=lambda r: r.number)
  setting = "tuning_examples" if data.tune else "dev_examples"
  where = (
    f"{len(kept)} of the {len(rows)} rows (config.data.{setting}, drawn by"
    f" config.data.subset_seed={data.subset_seed}); no row that is trained on"
    " begins with the same question"
  )
  return rest, kept, where + shrunk
