import numpy as np
import pytest

from vera_jax.errors import UserError
from vera_jax.tasks.glue import TASKS
from vera_jax.tasks.submission import write_submission

NAMES = {
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
  assert {path.name for path in tmp_path.iterdir()} == NAMES


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


def test_what_can_not_be_submitted(tmp_path):
  rte, stsb = TASKS["rte"], TASKS["stsb"]
  one, two = np.array([0]), np.array([0, 1])
  for task, guesses, index in (
    (rte, np.array([-1]), one),
    (rte, one, two),
    (stsb, np.array([np.nan]), one),
  ):
    with pytest.raises(ValueError):
      write_submission(tmp_path, task, "test", guesses, index)
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match="can't be written"):
    write_submission(tmp_path / "file", rte, "test", one, one)
