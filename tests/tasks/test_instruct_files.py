"""Rows of instructions: their forms, what is refused, what is held out."""

import json

import pytest
from ml_collections import ConfigDict

from vera_jax.data.tables import read_table, refuse_bad_rows
from vera_jax.data.templates import alpaca_prompt
from vera_jax.errors import UserError
from vera_jax.tasks.instruct_files import (
  as_text,
  read_splits,
  rows_of,
  schema_of,
)

ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}
DATA = {
  "dev": None,
  "dev_examples": 2,
  "tuning_examples": 3,
  "tune": False,
  "subset_seed": 0,
  "max_eval_examples": None,
  "skip_bad_rows": False,
}


def table(folder, *rows, name="a.json"):
  """A list in JSON, or for another name a line for each row."""
  path = folder / name
  lines = [json.dumps(row) + "\n" for row in rows]
  path.write_text(json.dumps(rows) if name == "a.json" else "".join(lines))
  return path


def read(path):
  read_rows = read_table(path)
  checked, rows = rows_of(read_rows, schema_of(read_rows))
  refuse_bad_rows([checked])
  return rows


def test_three_forms_are_told_by_their_columns(tmp_path):
  alpaca = {"instruction": "Add {input}.", "input": "1, 2", "output": "3"}
  first, second = read(table(tmp_path, alpaca, {**alpaca, "input": None}))
  assert first.messages == [
    {"role": "user", "content": "Add {input}.\n\n1, 2"},
    {"role": "assistant", "content": "3"},
  ]
  prompt, answer = as_text(first, "alpaca")
  assert answer == "3" and prompt.endswith(
    "### Instruction:\nAdd {input}.\n\n### Input:\n1, 2\n\n### Response:\n"
  )
  prompt, _ = as_text(second, "alpaca")
  assert "### Input" not in prompt and "\nAdd {input}.\n" in prompt
  assert prompt == alpaca_prompt("Add {input}.")
  assert as_text(first, "plain") == ("Add {input}.\n\n1, 2", "3")

  pair = {"prompt": "a", "completion": "b", "more": 1}
  [row] = read(table(tmp_path, pair, name="b.jsonl"))
  assert row.messages == [ASKED, ANSWERED]
  chat = [{"role": "system", "content": "s"}, ASKED, ANSWERED, ASKED]
  row, single = read(
    table(tmp_path, {"messages": chat}, {"messages": [ASKED, ANSWERED]})
  )
  assert row.messages == chat[:3]  # nothing is learned of a last question
  assert as_text(single, "plain") == ("a", "b")
  with pytest.raises(
    UserError, match="a.json, row 1: this is a conv.* of 3 mess"
  ):
    as_text(row, "alpaca")


def test_what_comes_before_a_question_is_part_of_the_conversation(tmp_path):
  """ShareGPT's rows, a column of system texts, and one of earlier turns are
  the conversations that they say."""
  system = {"role": "system", "content": "In French."}
  turns = [("human", "a"), ("gpt", "b"), ("human", "a"), ("assistant", "b")]
  shared = [{"from": name, "value": text} for name, text in turns]
  row, told, single = read(
    table(
      tmp_path,
      {"conversations": shared, "system": ""},
      {"conversations": json.dumps(shared[:2]), "system": "In French."},
      {"conversations": shared[:2]},
    )
  )
  assert row.messages == [ASKED, ANSWERED] * 2 and row.instruction is None
  assert told.messages == [system, ASKED, ANSWERED]
  assert as_text(single, "plain") == ("a", "b")

  alpaca = {"instruction": "a", "output": "b"}
  before = [["a", "b"], ["a", "b"]]
  row, plain = read(
    table(
      tmp_path,
      {**alpaca, "system": "In French.", "history": before},
      {**alpaca, "system": None, "history": []},
    )
  )
  assert row.messages == [system, *[ASKED, ANSWERED] * 3]
  assert as_text(plain, "plain") == ("a", "b")
  with pytest.raises(UserError, match="a conversation of 7 messages"):
    as_text(row, "alpaca")


def test_bad_rows_are_said_together_or_left_out(tmp_path):
  good = [{"prompt": f"q{i}", "completion": "a"} for i in range(20)]
  bad = [{"prompt": " ", "completion": "a"}, {"prompt": 3, "completion": "a"}]
  path = table(tmp_path, *good[:7], bad[0], *good[7:], bad[1], name="a.jsonl")
  path.write_text(path.read_text() + "{\n")
  data = ConfigDict({**DATA, "source": str(path)})
  with pytest.raises(UserError, match="3 of 23 rows can't be used") as error:
    read_splits(data)
  for words in (
    ":8: prompt is empty",
    ":22: prompt is no text",
    ":23: it is no",
  ):
    assert words in str(error.value)
  clean = read_splits(
    ConfigDict({**DATA, "source": str(table(tmp_path, *good, name="b.jsonl"))})
  )
  data.skip_bad_rows = True
  rest = read_splits(data)
  assert rest.stored == {"skipped_rows": {"train": 3}}
  assert "3 rows of" in rest.notes[0] and not clean.notes
  for split in ("train", "dev"):  # as if these rows had not been there
    messages = [row.messages for row in getattr(rest, split)]
    assert messages == [row.messages for row in getattr(clean, split)]


@pytest.mark.parametrize(
  "row, message",
  [
    ({"instruction": "a", "output": " "}, "row 1: output is empty"),
    ({"messages": [{**ASKED, "role": "human"}]}, "'human'; it is one of sys"),
    (
      {"conversations": [{"from": "function_call", "value": "f"}]},
      "its from is 'function_call'; it is one of human, gpt, system",
    ),
    (
      {"messages": [{**ASKED, "role": "system"}, ANSWERED], "system": "s"},
      "a system text in the column system, and another in messages",
    ),
    (
      {"messages": [ASKED, ANSWERED], "history": [["a", "b"]]},
      "the column history would change what is asked",
    ),
    (
      {"instruction": "a", "output": "b", "history": [["a", "b", "c"]]},
      "history is no list of .question, answer.",
    ),
    ({"messages": [ASKED]}, "no answer of the assistant"),
    (
      {"instruction": "a", "output": "b", "tools": ["f"]},
      "row 1: the column tools would change what is asked",
    ),
    (
      {"messages": [ASKED, {**ANSWERED, "tool_calls": [{"name": "f"}]}]},
      "row 1: message 2: the field tool_calls would change what is learned",
    ),
    (
      {"messages": [ASKED, {**ANSWERED, "weight": 0}]},
      "message 2: the weight is 0, but every answer is learned alike",
    ),
    ({"text": "a"}, "columns text are not those of instructions"),
    ({"prompt": "a", "completion": "b", "messages": []}, "more than one form"),
  ],
)
def test_what_is_no_instruction_is_refused(row, message, tmp_path):
  with pytest.raises(UserError, match=message):
    read(table(tmp_path, row))


def test_what_says_nothing_is_no_reason_to_refuse(tmp_path):
  empty = {"system": "", "history": [], "tools": "[]"}
  answer = {**ANSWERED, "weight": 1, "tool_calls": None, "thinking": ""}
  [row] = read(table(tmp_path, {"messages": [ASKED, answer], **empty}))
  assert row.messages == [ASKED, ANSWERED]


def test_questions_that_are_scored_are_not_trained_on(tmp_path):
  rows = [{"prompt": f"{i // 2}", "completion": f"{i}"} for i in range(20)]
  source = str(table(tmp_path, *rows))
  found = read_splits(ConfigDict({**DATA, "source": source}))
  tuning = read_splits(ConfigDict({**DATA, "source": source, "tune": True}))
  apart = [{row.opening for row in split.dev} for split in (found, tuning)]
  assert [len(split.dev) for split in (found, tuning)] == [2, 3]
  assert found.train == tuning.train and len(found.train) == 10
  assert not apart[0] & apart[1]
  assert not {row.opening for row in found.train} & (apart[0] | apart[1])
  few = read_splits(
    ConfigDict({**DATA, "source": source, "max_eval_examples": 1})
  )
  assert len(few.dev) == 1 and few.dev[0] in found.dev
  for wrong in ({"dev_examples": 0}, {"tuning_examples": 0, "tune": True}):
    with pytest.raises(UserError, match="config.data.(dev_examples|tune) "):
      read_splits(ConfigDict({**DATA, "source": source, **wrong}))


def test_of_a_small_file_half_is_held_out(tmp_path):
  rows = [{"prompt": f"{i}", "completion": "a"} for i in range(10)]
  source = str(table(tmp_path, *rows))
  data = {**DATA, "source": source, "dev_examples": 30, "tuning_examples": 20}
  small = read_splits(ConfigDict(data))
  tuned = read_splits(ConfigDict({**data, "tune": True}))
  assert [len(x) for x in (small.dev, tuned.dev, small.train)] == [3, 2, 5]
  few = read_splits(ConfigDict({**data, "dev_examples": 2}))
  assert len(few.dev) == 2 and "dev_examples" not in few.where.split(":")[-1]
  said = "dev_examples 3 in place of 30, tuning_examples 2 in place of 20"
  assert said in small.where and "only 10 different questions" in small.where
  two = str(table(tmp_path, *rows[:2], name="b.jsonl"))
  splits = read_splits(ConfigDict({**data, "source": two}))
  assert [len(x) for x in (splits.dev, splits.train)] == [1, 1]
  one = str(table(tmp_path, rows[0], name="c.jsonl"))
  with pytest.raises(UserError, match="of the 1 different questions"):
    read_splits(ConfigDict({**data, "source": one}))


def test_no_part_of_a_scored_conversation_is_trained_on(tmp_path):
  """Rows of one first question stay together, however far they go on."""
  rows = []
  for i in range(6):
    turns = [ASKED, ANSWERED, ASKED, ANSWERED]
    turns = [{**turn, "content": f"{i} {k}"} for k, turn in enumerate(turns)]
    greeting = {"role": "assistant", "content": "Hello."}
    rows += [{"messages": turns[:2]}, {"messages": turns}]
    rows += [{"messages": [greeting, *turns]}, {"messages": [greeting, *turns]}]
  source = str(table(tmp_path, *rows))
  data = {**DATA, "source": source}
  found = read_splits(ConfigDict(data))
  tuning = read_splits(ConfigDict({**data, "tune": True}))
  assert [len(split.dev) for split in (found, tuning)] == [2, 3]
  # of each question two rows, with a greeting before it or without
  assert len(found.train) == 2 * (12 - 2 - 3)
  openings = {row.opening for row in found.train}
  assert len(openings) == 12 - 2 - 3
  assert not openings & {row.opening for row in found.dev + tuning.dev}
  dev = str(table(tmp_path, *rows[:4:3], name="dev.jsonl"))
  long = read_splits(ConfigDict({**data, "dev": dev, "tuning_examples": 0}))
  assert "2 of their first questions are trained on" in long.where


def test_single_questions_are_drawn_as_ever(tmp_path):
  """The committed results were scored on these rows."""
  rows = [{"prompt": f"{i // 2}", "completion": f"{i}"} for i in range(20)]
  data = {**DATA, "source": str(table(tmp_path, *rows))}
  found = read_splits(ConfigDict(data))
  assert [row.number for row in found.dev] == [8, 12]
  tuning = read_splits(ConfigDict({**data, "tune": True}))
  assert [row.number for row in tuning.dev] == [4, 6, 14]


def test_rates_are_not_chosen_by_the_rows_of_a_dev_file(tmp_path):
  rows = [{"prompt": f"{i // 2}", "completion": f"{i}"} for i in range(20)]
  source = str(table(tmp_path, *rows))
  dev = str(table(tmp_path, *rows[:10], name="dev.jsonl"))
  data = {**DATA, "source": source, "dev": dev}
  found = read_splits(ConfigDict(data))
  tuning = read_splits(ConfigDict({**data, "tune": True}))
  assert found.train == tuning.train and len(found.train) == 14
  assert len(found.dev) == 10 and len(tuning.dev) == 3
  assert (
    "3 questions are kept from training for config.data.tune" in found.where
  )
  apart = {row.opening for row in tuning.dev}
  assert not apart & {row.opening for row in found.train + found.dev}
  many = read_splits(ConfigDict({**data, "tuning_examples": 6}))
  assert "tuning_examples 5 in place of 6" in many.where
  with pytest.raises(UserError, match="config.data.tune "):
    read_splits(ConfigDict({**data, "tuning_examples": 0, "tune": True}))


def test_a_dev_file_is_scored_as_it_is(tmp_path):
  row = {"prompt": "a", "completion": "b"}
  source = str(table(tmp_path, row, {**row, "prompt": "c"}))
  dev = str(table(tmp_path, row, name="dev.jsonl"))
  data = {**DATA, "source": source, "dev": dev, "tuning_examples": 0}
  found = read_splits(ConfigDict(data))
  assert len(found.train) == 2 and len(found.dev) == 1
  assert found.where == f"1 rows of {dev}; 1 of their first questions are" + (
    " trained on as well"
  )
  with pytest.raises(UserError, match="There is no file .*none.json"):
    read_splits(ConfigDict({**DATA, "source": str(tmp_path / "none.json")}))
  with pytest.raises(UserError, match="config.data.source=NAME"):
    read_splits(ConfigDict({**DATA, "source": None}))
