"""Rows of instructions: their forms, what is refused, what is held out."""

import json

import pytest
from ml_collections import ConfigDict

from vera_jax.data.tables import read_table
from vera_jax.errors import UserError
from vera_jax.tasks.instruct_files import (
  alpaca_prompt,
  as_text,
  form_of,
  read_splits,
  rows_of,
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
}


def table(folder, *rows, name="a.json"):
  """A list in JSON, or for another name a line for each row."""
  path = folder / name
  lines = [json.dumps(row) + "\n" for row in rows]
  path.write_text(json.dumps(rows) if name == "a.json" else "".join(lines))
  return path


def read(path):
  found = read_table(path)
  return rows_of(found, form_of(found))


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


@pytest.mark.parametrize(
  "row, message",
  [
    ({"instruction": "a", "output": " "}, "row 1: output is empty"),
    ({"instruction": 3, "output": "a"}, "row 1: instruction is no text: 3"),
    ({"messages": "hello"}, "messages is no list"),
    ({"messages": [ASKED, "hello"]}, "message 2 is no {"),
    ({"messages": [{**ASKED, "role": "human"}]}, "'human'; it is one of sys"),
    ({"messages": [{**ASKED, "content": ""}]}, "message 1: the content is emp"),
    ({"messages": [ASKED]}, "no answer of the assistant"),
    ({"messages": [ANSWERED]}, "no answer of the assistant"),
    ({"text": "a"}, "columns text are not those of instructions"),
    ({"prompt": "a", "completion": "b", "messages": []}, "more than one form"),
  ],
)
def test_what_is_no_instruction_is_refused(row, message, tmp_path):
  with pytest.raises(UserError, match=message):
    read(table(tmp_path, row))


def test_questions_that_are_scored_are_not_trained_on(tmp_path):
  rows = [{"prompt": f"{i // 2}", "completion": f"{i}"} for i in range(20)]
  source = str(table(tmp_path, *rows))
  found = read_splits(ConfigDict({**DATA, "source": source}))
  tuning = read_splits(ConfigDict({**DATA, "source": source, "tune": True}))
  apart = [{row.key for row in split.dev} for split in (found, tuning)]
  assert [len(split.dev) for split in (found, tuning)] == [2, 3]
  assert found.train == tuning.train and len(found.train) == 10
  assert not apart[0] & apart[1]
  assert not {row.key for row in found.train} & (apart[0] | apart[1])
  few = read_splits(
    ConfigDict({**DATA, "source": source, "max_eval_examples": 1})
  )
  assert len(few.dev) == 1 and few.dev[0] in found.dev
  for wrong in ({"dev_examples": 7}, {"tuning_examples": 0, "tune": True}):
    with pytest.raises(UserError, match="config.data.(dev_examples|tune) "):
      read_splits(ConfigDict({**DATA, "source": source, **wrong}))


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
  apart = {row.key for row in tuning.dev}
  assert not apart & {row.key for row in found.train + found.dev}
  for wrong in ({"tuning_examples": 6}, {"tuning_examples": 0, "tune": True}):
    with pytest.raises(UserError, match="config.data.(tuning_examples|tune) "):
      read_splits(ConfigDict({**data, **wrong}))


def test_a_dev_file_is_scored_as_it_is(tmp_path):
  row = {"prompt": "a", "completion": "b"}
  source = str(table(tmp_path, row, {**row, "prompt": "c"}))
  dev = str(table(tmp_path, row, name="dev.jsonl"))
  data = {**DATA, "source": source, "dev": dev, "tuning_examples": 0}
  found = read_splits(ConfigDict(data))
  assert len(found.train) == 2 and len(found.dev) == 1
  assert found.where == f"1 rows of {dev}; 1 of their questions are trained" + (
    " on as well"
  )
  with pytest.raises(UserError, match="There is no file .*none.json"):
    read_splits(ConfigDict({**DATA, "source": str(tmp_path / "none.json")}))
  with pytest.raises(UserError, match="config.data.source=NAME"):
    read_splits(ConfigDict({**DATA, "source": None}))
