"""GLUE's own files, what can be wrong with them, and submissions."""

import logging
import re

import numpy as np
import pytest

from vera_jax.errors import UserError
from vera_jax.tasks.glue_data import load_split, write_submission
from vera_jax.tasks.glue_facts import TASKS, glue_task

QUOTE = 'He said "it is'
TRAIN = {  # first example's texts, labels
  "cola": ([QUOTE], [1, 0]),
  "sst2": ([QUOTE + " "], [1, 0]),
  "mrpc": ([QUOTE, "second"], [1, 0]),
  "qqp": ([QUOTE, "Why?"], [1, 0]),
  "stsb": ([QUOTE, "cat"], [5.0, 0.5]),
  "mnli": ([QUOTE, "Yes."], [2, 0]),
  "qnli": (["Who?", QUOTE], [1, 0]),
  "rte": ([QUOTE, "B."], [1, 0]),
  "wnli": ([QUOTE, "B."], [1, 0]),
}


def test_all_nine_tasks_are_there():
  assert sorted(TASKS) == sorted(TRAIN)
  with pytest.raises(UserError, match="no GLUE task 'rtf'.*cola"):
    glue_task("rtf")
  assert glue_task("rte") is TASKS["rte"]


@pytest.mark.parametrize("name", TRAIN)
def test_the_files_of_every_task(tiny_glue, name):
  texts, labels = TRAIN[name]
  task = TASKS[name]
  examples = load_split(task, tiny_glue, "train")
  assert examples.first[0] == texts[0]
  assert (examples.second or [None])[0] == (texts + [None])[1]
  dtype = np.float32 if task.regression else np.int32
  expected = np.array(labels, dtype)
  np.testing.assert_array_equal(examples.labels, expected, strict=True)
  np.testing.assert_array_equal(examples.index, [0, 1])
  for split in task.dev_splits:
    dev = load_split(task, tiny_glue, split)
    assert len(dev) == 1 and dev.labels is not None
  for split in task.test_splits:
    assert load_split(task, tiny_glue, split).labels is None


def test_mnli_has_two_dev_and_two_test_files(tiny_glue):
  for part in ("matched", "mismatched"):
    dev = load_split(TASKS["mnli"], tiny_glue, f"validation_{part}")
    assert dev.first == [part]
    assert load_split(TASKS["mnli"], tiny_glue, f"test_{part}").first == [part]
  with pytest.raises(UserError, match="mnli has no split 'validation'"):
    load_split(TASKS["mnli"], tiny_glue, "validation")


def test_columns_are_found_by_name(tiny_glue):
  path = tiny_glue / "RTE/train.tsv"
  path.write_text("label\tsentence2\tindex\tsentence1\nentailment\tB\t0\tA\n")
  examples = load_split(TASKS["rte"], tiny_glue, "train")
  assert (examples.first, examples.second) == (["A"], ["B"])


def test_only_line_ends_end_lines(tiny_glue):
  path = tiny_glue / "SST-2/train.tsv"
  path.write_text("sentence\tlabel\na\u2028b\x0cc\x85d\t1\n", encoding="utf-8")
  examples = load_split(TASKS["sst2"], tiny_glue, "train")
  assert examples.first == ["a\u2028b\x0cc\x85d"]


def test_qqp_rows_cut_short_are_left_out_as_on_the_hub(tiny_glue, caplog):
  path = tiny_glue / "QQP/train.tsv"
  path.write_text(path.read_text() + "9\t5\t6\tHalf a\nquestion\tB?\t0\n")
  with caplog.at_level(logging.WARNING):
    assert len(load_split(TASKS["qqp"], tiny_glue, "train")) == 2
  assert "2 rows are cut short" in caplog.text


RTE = "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n"
STSB = "sentence1\tsentence2\tscore\nA\tB\t5\n"
BAD = [
  ("rte", RTE + "1\tA\tB\n", r"train.tsv:3: 3 columns .* be 4"),
  ("rte", RTE + "1\tA\tB\tmaybe\n", r"train.tsv:3: label 'maybe' \(unknown"),
  ("cola", "s\t1\t\tA\ns\t-1\t\tB\n", r"train.tsv:2: label '-1' .*without"),
  ("cola", "source\tlabel\tmark\tsentence\n", r"train.tsv:1: label 'label'"),
  ("cola", "", r"train.tsv has no examples"),
  ("stsb", STSB + "A\tB\tbig\n", r"train.tsv:3: score 'big' is not a number"),
  ("stsb", STSB + "A\tB\t5.1\n", r"train.tsv:3: score '5.1' .*from 0 to 5"),
  ("stsb", STSB + "A\tB\tnan\n", r"train.tsv:3: score 'nan'"),
  ("rte", "index\tsentence1\tlabel\n0\tA\t1\n", r":1: .*no column 'sentence2'"),
  ("rte", RTE + "1\tcaf\udce9\tB\tentailment\n", r":3: .*UTF-8 \(byte 0xe9"),
]


@pytest.mark.parametrize("name, text, message", BAD)
def test_bad_files_are_named_with_their_line(tmp_path, name, text, message):
  data = text.encode(errors="surrogateescape")  # a byte that is not UTF-8
  (tmp_path / "train.tsv").write_bytes(data)
  with pytest.raises(UserError, match=message) as error:
    load_split(TASKS[name], tmp_path, "train")
  assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("index", ["x", "9" * 30])
def test_a_bad_index_in_a_test_file(index, tiny_glue):
  (tiny_glue / "RTE/test.tsv").write_text(
    f"index\tsentence1\tsentence2\n{index}\tA\tB\n"
  )
  with pytest.raises(UserError, match=rf"test.tsv:2: index '{index}'"):
    load_split(TASKS["rte"], tiny_glue, "test")


def test_missing_files_say_what_is_expected(tiny_glue, tmp_path):
  (tiny_glue / "MNLI/train.tsv").unlink()
  names = "train.tsv, dev_matched.tsv, dev_mismatched.tsv, test_matched.tsv"
  with pytest.raises(UserError, match=re.escape(names)) as error:
    load_split(TASKS["mnli"], tiny_glue, "train")
  assert "MNLI/" in str(error.value)
  with pytest.raises(UserError, match="no such folder"):
    load_split(TASKS["rte"], tmp_path / "nowhere", "train")


ROWS = {
  "rte": ((2490, 277, 3000), [1249, 1241]),
  "cola": ((8551, 1043, 1063), [2528, 6023]),
  "sst2": ((67349, 872, 1821), [29780, 37569]),
}


@pytest.mark.parametrize("name", ROWS)
def test_official_sizes(glue_folder, name):
  task = TASKS[name]
  counts, labels = ROWS[name]
  splits = [load_split(task, glue_folder, split) for split in task.splits]
  assert tuple(map(len, splits)) == counts
  assert (task.size.train, task.size.dev) == counts[:2]
  assert splits[0].labels is not None and splits[2].labels is None
  assert np.bincount(splits[0].labels).tolist() == labels
  if name == "sst2":  # the hub keeps the space at the end, too
    hidden = "hide new secretions from the parental units "
    assert splits[0].first[0] == hidden


SUBMISSIONS = {
  "CoLA.tsv",
  "SST-2.tsv",
  "MRPC.tsv",
  "STS-B.tsv",
  "QQP.tsv",
  "MNLI-m.tsv",
  "MNLI-mm.tsv",
  "QNLI.tsv",
  "RTE.tsv",
  "WNLI.tsv",
}


def test_one_file_for_each_test_split(tmp_path):
  for task in TASKS.values():
    for split in task.test_splits:
      write_submission(tmp_path, task, split, np.array([0]), np.array([0]))
  assert {path.name for path in tmp_path.iterdir()} == SUBMISSIONS


@pytest.mark.parametrize(
  "name, guesses, words",
  [
    ("rte", [1, 0], ["not_entailment", "entailment"]),
    ("qnli", [0, 1], ["entailment", "not_entailment"]),
    ("mnli", [2, 1], ["contradiction", "neutral"]),
    ("wnli", [1, 0], ["1", "0"]),
    ("cola", [1, 0], ["1", "0"]),
    ("stsb", [2.71828, 5.4], ["2.718", "5.000"]),
    ("stsb", [-0.3, 0.0], ["0.000", "0.000"]),
  ],
)
def test_words_and_index(tmp_path, name, guesses, words):
  task = TASKS[name]
  path = write_submission(
    tmp_path / "new",
    task,
    task.test_splits[-1],
    np.array(guesses),
    np.array([7, 9]),
  )
  expected = f"index\tprediction\n7\t{words[0]}\n9\t{words[1]}\n"
  assert path.read_text() == expected
