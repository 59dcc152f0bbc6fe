"""The nine GLUE tasks: their files, columns, labels and metrics.

Facts of the GLUE benchmark (Wang et al., 2018). Label names stand in the order
of the ids that the hub's `nyu-mll/glue` uses. The first metric of a task is its
score: the one that the VeRA paper reports (section 4.1).
"""

from dataclasses import dataclass, replace

from vera_jax.errors import UserError
from vera_jax.tasks.task import Size


@dataclass(frozen=True)
class GlueTask:
  """One task: how its files, the hub and GLUE's server write it.

  Attributes:
    name: the hub's configuration name.
    folder: the name of the task's folder as GLUE ships it.
    columns: the hub's text columns, one or two.
    file_columns: the same columns in the files' headers.
    file_label: the label's column in the files.
    labels: label names in hub id order; () for regression.
    written: the labels as files and submissions spell them, same order.
    metrics: names that `metrics.score` knows; the first is the score.
    headerless: the columns of train and dev files that have no header line.
    dev_splits, test_splits: hub names of the splits.
    submissions: the file that GLUE's server takes for each test split.
    broken_rows: whether GLUE's own files hold rows that are cut short. The
      hub leaves those out, and so do we.
  """

  name: str
  folder: str
  columns: tuple[str, ...]
  file_columns: tuple[str, ...]
  file_label: str
  labels: tuple[str, ...]
  written: tuple[str, ...]
  metrics: tuple[str, ...] = ("accuracy",)
  headerless: tuple[str, ...] = ()
  dev_splits: tuple[str, ...] = ("validation",)
  test_splits: tuple[str, ...] = ("test",)
  submissions: tuple[str, ...] = ()
  broken_rows: bool = False

  @property
  def regression(self) -> bool:
    return not self.labels

  @property
  def num_labels(self) -> int:
    """Outputs of the head: classes, or one for regression."""
    return len(self.labels) or 1

  @property
  def splits(self) -> tuple[str, ...]:
    return ("train", *self.dev_splits, *self.test_splits)


ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("entailment", "neutral", "contradiction")
IDS = ("0", "1")

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
  ),
)

TASKS: dict[str, GlueTask] = {task.name: task for task in _TASKS}
# The quickstart's pairs, made by experiments/make_entailment.py: no benchmark.
GENERATED = replace(
  TASKS["rte"],
  name="generated_entailment",
  folder="entailment",
  submissions=("generated_entailment.tsv",),
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


# GLUE's own numbers of examples. Tokens: counted for sst2, cola and rte with
# BERT's tokenizer, by the length of the texts for the others.
SIZES = {
  "cola": Size(8551, 1043, 11),
  "sst2": Size(67349, 872, 13),
  "mrpc": Size(3668, 408, 53),
  "stsb": Size(5749, 1500, 31),
  "qqp": Size(363846, 40430, 31),
  "mnli": Size(392702, 19647, 40),
  "qnli": Size(104743, 5463, 51),
  "rte": Size(2490, 277, 70),
  "wnli": Size(635, 71, 38),
  "generated_entailment": Size(2000, 320, 28),
}
