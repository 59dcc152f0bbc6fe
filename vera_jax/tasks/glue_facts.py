"""The nine GLUE tasks: their files, columns, labels and metrics.

Facts of the GLUE benchmark (Wang et al., 2018). Label names stand in the order
of the ids that the hub's `nyu-mll/glue` uses. The first metric of a task is its
score: the one that the VeRA paper reports (section 4.1).
"""

from dataclasses import dataclass, replace
from typing import Any

from vera_jax.errors import UserError
from vera_jax.tasks.task import Size, ToTexts


@dataclass(frozen=True)
class GlueTask:
  """One task of GLUE or SuperGLUE: how files, hub and server write it.

  Attributes:
    name: the hub's configuration name.
    folder: the name of the task's folder as the benchmark ships it.
    columns: the hub's text columns.
    file_columns: the same columns in the files' headers, or keys of their JSON
      lines.
    file_label: the label's column in the files.
    labels: label names in hub id order; () for regression.
    written: the labels as the files spell them, in the same order: texts in
      TSV, JSON values in JSON lines.
    submitted: the labels as submissions spell them.
    metrics: names that `metrics.score` knows; the first is the score.
    headerless: the columns of train and dev files that have no header line.
    dev_splits, test_splits: hub names of the splits.
    submissions: the file that the benchmark's server takes for each test split.
    broken_rows: whether GLUE's own files hold rows that are cut short. The
      hub leaves those out, and so do we.
    json_lines: whether files and submissions are JSON lines, as SuperGLUE's, or
      else GLUE's tab-separated values.
    to_texts: (an example's texts by `columns`) -> what the model reads, a text
      or pair per choice; None where it reads the columns as they are.
    choices: whether the labels are choices, each scored as a text of its own.
    size: the size of the data as they are published.
  """

  name: str
  folder: str
  columns: tuple[str, ...]
  file_columns: tuple[str, ...]
  file_label: str
  labels: tuple[str, ...]
  written: tuple[Any, ...]
  metrics: tuple[str, ...] = ("accuracy",)
  headerless: tuple[str, ...] = ()
  dev_splits: tuple[str, ...] = ("validation",)
  test_splits: tuple[str, ...] = ("test",)
  submissions: tuple[str, ...] = ()
  broken_rows: bool = False
  json_lines: bool = False
  submitted: tuple[Any, ...] = ()
  to_texts: ToTexts | None = None
  choices: bool = False
  size: Size | None = None

  @property
  def regression(self) -> bool:
    """Whether the label is a number and no class."""
    return not self.labels

  @property
  def splits(self) -> tuple[str, ...]:
    """The hub's names of all splits."""
    return ("train", *self.dev_splits, *self.test_splits)


ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("entailment", "neutral", "contradiction")
IDS = ("0", "1")

# The sizes are GLUE's own. Tokens are counted for sst2, cola and rte with
# BERT's tokenizer, and are by the length of the texts for the others.
_TASKS = (
  GlueTask(
    "cola",
    "CoLA",
    columns=("sentence",),
    file_columns=("sentence",),
    file_label="label",
    labels=("unacceptable", "acceptable"),
    written=IDS,
    metrics=("matthews",),
    headerless=("source", "label", "mark", "sentence"),
    submissions=("CoLA.tsv",),
    size=Size(8551, 1043, 11),
  ),
  GlueTask(
    "sst2",
    "SST-2",
    columns=("sentence",),
    file_columns=("sentence",),
    file_label="label",
    labels=("negative", "positive"),
    written=IDS,
    submissions=("SST-2.tsv",),
    size=Size(67349, 872, 13),
  ),
  GlueTask(
    "mrpc",
    "MRPC",
    columns=("sentence1", "sentence2"),
    file_columns=("#1 String", "#2 String"),
    file_label="Quality",
    labels=("not_equivalent", "equivalent"),
    written=IDS,
    metrics=("accuracy", "f1"),
    submissions=("MRPC.tsv",),
    size=Size(3668, 408, 53),
  ),
  GlueTask(
    "qqp",
    "QQP",
    columns=("question1", "question2"),
    file_columns=("question1", "question2"),
    file_label="is_duplicate",
    labels=("not_duplicate", "duplicate"),
    written=IDS,
    metrics=("accuracy", "f1"),
    submissions=("QQP.tsv",),
    size=Size(363846, 40430, 31),
    broken_rows=True,
  ),
  GlueTask(
    "stsb",
    "STS-B",
    columns=("sentence1", "sentence2"),
    file_columns=("sentence1", "sentence2"),
    file_label="score",
    labels=(),
    written=(),
    metrics=("pearson", "spearman"),
    submissions=("STS-B.tsv",),
    size=Size(5749, 1500, 31),
  ),
  GlueTask(
    "mnli",
    "MNLI",
    columns=("premise", "hypothesis"),
    file_columns=("sentence1", "sentence2"),
    file_label="gold_label",
    labels=MNLI,
    written=MNLI,
    dev_splits=("validation_matched", "validation_mismatched"),
    test_splits=("test_matched", "test_mismatched"),
    submissions=("MNLI-m.tsv", "MNLI-mm.tsv"),
    size=Size(392702, 19647, 40),
  ),
  GlueTask(
    "qnli",
    "QNLI",
    columns=("question", "sentence"),
    file_columns=("question", "sentence"),
    file_label="label",
    labels=ENTAILMENT,
    written=ENTAILMENT,
    submissions=("QNLI.tsv",),
    size=Size(104743, 5463, 51),
  ),
  GlueTask(
    "rte",
    "RTE",
    columns=("sentence1", "sentence2"),
    file_columns=("sentence1", "sentence2"),
    file_label="label",
    labels=ENTAILMENT,
    written=ENTAILMENT,
    submissions=("RTE.tsv",),
    size=Size(2490, 277, 70),
  ),
  GlueTask(
    "wnli",
    "WNLI",
    columns=("sentence1", "sentence2"),
    file_columns=("sentence1", "sentence2"),
    file_label="label",
    labels=("not_entailment", "entailment"),
    written=IDS,
    submissions=("WNLI.tsv",),
    size=Size(635, 71, 38),
  ),
)

TASKS: dict[str, GlueTask] = {task.name: task for task in _TASKS}
# The quickstart's pairs, made by experiments/make_entailment.py: no benchmark.
GENERATED = replace(
  TASKS["rte"],
  name="generated_entailment",
  folder="entailment",
  submissions=("generated_entailment.tsv",),
  size=Size(2000, 320, 28),
)


def glue_task(name: str) -> GlueTask:
  """The task of that name, or a UserError that lists the names."""
  if name == GENERATED.name:
    return GENERATED
  if name not in TASKS:
    raise UserError(
      f"There is no GLUE task {name!r}. The tasks are: {', '.join(TASKS)}."
    )
  return TASKS[name]
