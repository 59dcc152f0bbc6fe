"""A user's own labelled texts, from files or the hub.

Columns, kind of problem and label names are taken from the data where
`config.data` doesn't say them, and a run's first lines say what was decided.
They are stored with the adapter, so that prediction needs no training data.
"""

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.examples import Examples
from vera_jax.data.hub_data import download, hub_table
from vera_jax.data.tables import SUFFIXES, Table, read_table, some
from vera_jax.errors import UserError
from vera_jax.files import parse_json
from vera_jax.models.kinds import CLASSES, LABELLED, NUMBER, SEVERAL, TAGS
from vera_jax.places import local_copy
from vera_jax.tasks.classification import PROBABILITY, classification
from vera_jax.tasks.own_rows import (
  check_own_data,
  columns_of,
  dev_size,
  keep_apart,
  size_of,
  skip_bad_rows,
)
from vera_jax.tasks.tagging import are_bio, tagging
from vera_jax.tasks.task import Presentation, Task

NAMES = ("text",)
# Names by which the columns of texts are found.
COLUMNS = (
  *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("text1", "text2")),
  *(("text",), ("sentence",), ("review",), ("tokens",), ("words",)),
)
LABELS = ("label", "labels", "class", "category", "score", "tags", "ner_tags")
SPLITS = {"train": ("train",), "dev": ("dev", "validation", "val")}
MARKS = 2**28  # at most, where each row has one for every label
MOST_CLASSES = 20  # more different whole numbers than that are values
SEVERAL_APART = re.compile(r"[|;]")  # between the labels in a CSV's cell
METRICS = {
  CLASSES: ("accuracy", "macro_f1"),
  NUMBER: ("pearson", "spearman"),
  SEVERAL: ("micro_f1", "macro_f1"),
}
# What config.select may name, and the score that it is: of a loss, the score
# that is highest where the loss is lowest.
SELECT = {
  CLASSES: {
    **{x: x for x in ("accuracy", "macro_f1", "balanced_accuracy", "matthews")},
    "loss": PROBABILITY,
  },
  NUMBER: {"pearson": "pearson", "spearman": "spearman", "loss": "r2"},
  SEVERAL: {
    "micro_f1": "micro_f1",
    "macro_f1": "macro_f1",
    "loss": PROBABILITY,
  },
}
CLASS_WEIGHTS = (None, "balanced")
UNLIKE = 5  # times as many rows of one class as of another
LARGEST = float(np.finfo(np.float32).max)  # of the values of a regression


class Facts(NamedTuple):
  """What is decided about a data set.

  Attributes:
    columns: the column of the texts, or the two of pairs.
    label: the label's column.
    kind: a name in `models.kinds.LABELLED`.
    labels: the class names, in the order of their ids; () for regression.
  """

  columns: tuple[str, ...]
  label: str
  kind: str
  labels: tuple[str, ...]


def task_for(config: ConfigDict) -> Task | None:
  """The task that a user's data are; None where config.task has another name.

  Raises:
    UserError: the data can't be read, or it isn't clear what they are; the
      message names file and line.
  """
  if config.task not in NAMES:
    return None
  check_own_data(
    config,
    instead=". Answer your own texts by vera-jax predict"
    " --adapter=RUN/adapter --input=FILE",
  )
  data = config.data
  name, table, dev_table = read_tables(data)
  facts = _decide(table, data)
  table, train = _examples(table, facts)
  examples = {"train": train}
  if dev_table is not None:
    dev_table, examples["dev"] = _examples(dev_table, facts)
  stored, skipped = skip_bad_rows({"train": table, "dev": dev_table}, data)
  if dev_table is not None:
    where = f"{dev_table.name}, {len(examples['dev'])} rows"
  else:
    examples, where = keep_apart(
      examples["train"],
      _dev_rows(examples["train"], facts, data),
      data,
      how=", stratified" if facts.kind == CLASSES else "",
    )

  def read_split(source: Any, split: str) -> Examples:
    return examples[split]

  metrics, weights, advice = _scores(config, facts, examples["train"])
  notes = [*_notes(facts, examples["train"], said=data.kind), *advice, *skipped]
  presentation = Presentation(
    columns=(facts.columns,),
    size=size_of(examples),
    notes=(*notes, f"dev: {where}"),
  )
  name = f"text:{name}"  # no name of a benchmark's task
  if facts.kind == TAGS:
    task = tagging(
      name,
      labels=facts.labels,
      read_split=read_split,
      dev_splits=("dev",),
      presentation=presentation,
    )
  else:
    task = classification(
      name,
      labels=facts.labels,
      metrics=metrics,
      read_split=read_split,
      dev_splits=("dev",),
      presentation=presentation,
      kind=facts.kind,
      class_weights=weights,
    )
  return task._replace(stored={"columns": list(facts.columns), **stored})


def read_tables(data: ConfigDict) -> tuple[str, Table, Table | None]:
  """The data's name, and their tables; None for dev where there is none.

  Rows that can't be read are among the tables' `bad` ones.

  Args:
    data: "source", a hub id or a folder, and "train" and "dev", files.

  Raises:
    UserError: there are no training data, or some can't be read.
  """
  files = {split: data[split] for split in SPLITS}
  source = data.source
  path = files["train"] and local_copy(files["train"])
  if path and not path.exists() and not path.suffix and "/" in files["train"]:
    source, path = files["train"], None  # a hub id
  if path:
    if path.is_dir():
      source = path
    else:
      name = path.absolute().parent.name if path.stem == "train" else path.stem
      dev = files["dev"] and read_table(files["dev"], strict=False)
      return name, read_table(path, strict=False), dev or None
  if not source:
    raise UserError(
      "Name the data: config.data.train=FILE (and config.data.dev=FILE), each"
      f" with a name in {', '.join(SUFFIXES)}; or config.data.source=NAME, a"
      " hub id or a folder that holds train and dev files."
    )
  tables: dict[str, Table] = {}
  folder = local_copy(source)
  if folder.is_dir():
    for split, names in SPLITS.items():
      paths = [
        path
        for path in sorted(folder.iterdir())
        if path.stem in names and path.suffix in SUFFIXES
      ]
      if len(paths) > 1:
        raise UserError(
          f"{folder} has {' and '.join(p.name for p in paths)}: name the file,"
          f" config.data.{split}=FILE."
        )
      for path in paths:
        tables[split] = read_table(path, inside=folder, strict=False)
    name = folder.absolute().name
  else:
    hub_id, _, part = str(source).partition(":")
    splits = download(hub_id, part or None)
    for split, names in SPLITS.items():
      for rows in [splits[name] for name in names if name in splits][:1]:
        tables[split] = hub_table(source, split, rows)
    name = hub_id.rpartition("/")[2]
  if "train" not in tables:
    raise UserError(
      f"{source} has no training data named train. A file of another name is"
      " given itself, not its folder."
    )
  if files["dev"]:
    tables["dev"] = read_table(files["dev"], strict=False)
  return name, tables["train"], tables.get("dev")


def _decide(table: Table, data: ConfigDict) -> Facts:
  """Columns, kind and labels: what the config says, else what the table shows.

  Raises:
    UserError: there is not exactly one possibility.
  """
  columns, label = _find_columns(table, data)
  kind = data.kind
  if kind and kind not in LABELLED:
    raise UserError(
      f"config.data.kind is {kind!r}; choose from {', '.join(LABELLED)}."
    )
  # what a row without a label has to do with it is said by `_examples`
  table, values = table.read_each(lambda row: _value(table, row, label, kind))
  names = table.classes.get(label)
  if not kind:
    kind = _kind(values, table.columns[columns[0]], named=bool(names))
  if kind == NUMBER:
    return Facts(columns, label, kind, ())
  if kind == TAGS and len(columns) == 2:
    raise UserError(
      "Tags are of the words of one text: config.data.text names two columns."
    )
  if data.labels:
    labels = tuple(map(_name, data.labels))
    if len({*labels}) < len(labels):
      raise UserError(
        f"config.data.labels names a label twice: {', '.join(labels)}."
      )
  elif names:
    labels = tuple(names)
  else:
    several = kind in (SEVERAL, TAGS)
    all_names = {
      name
      for value in values
      for name in (_names(value, kind) if several else [_name(value)])
    }
    labels = tuple(sorted(all_names, key=_order))
    if kind == TAGS and are_bio(labels):  # each type with both of its tags
      types = sorted({name[2:] for name in labels if name != "O"})
      labels = ("O", *(f"{mark}-{t}" for t in types for mark in "BI"))
    if kind == CLASSES and not data.kind and len(labels) > MOST_CLASSES:
      if len(labels) > len(values) / 2:
        raise UserError(
          f"{table.name}: {label} has {len(labels)} different values in"
          f" {len(values)} rows. Is it the label (config.data.label)? If so,"
          " config.data.kind=classification takes them as classes, and"
          " config.data.kind=regression takes numbers as values."
        )
  if kind == SEVERAL and len(labels) * len(values) > MARKS:
    raise UserError(
      f"{table.name}: {label} has {len(labels)} different labels in"
      f" {len(values)} rows, of which every row would have a mark for each. Is"
      " it the label (config.data.label)?"
    )
  if len(labels) < (1 if kind == SEVERAL else 2):
    raise UserError(
      f"{table.name}: {label} has only the label {', '.join(labels) or 'none'};"
      " there is nothing to learn."
    )
  return Facts(columns, label, kind, labels)


def _find_columns(
  table: Table, data: ConfigDict
) -> tuple[tuple[str, ...], str]:
  """(one or two columns of texts, the label's).

  Raises:
    UserError: there is not exactly one possibility.
  """
  there = f"The columns of {table.name} are {some(table.columns)}."
  label = data.label
  if not label:
    known = [name for name in LABELS if name in table.columns]
    if len(known) != 1:
      raise UserError(
        f"It is not clear which column is the label ({len(known)} have a name"
        f" that is known): say config.data.label=NAME. {there}"
      )
    label = known[0]
  columns = columns_of(
    table,
    data.text,
    COLUMNS,
    label=label,
    question="holds the texts: say config.data.text=NAME, or for pairs"
    " config.data.text=\"('FIRST','SECOND')\"",
  )
  for name in (label, *columns):
    if name not in table.columns:
      raise UserError(f"There is no column {name!r}. {there}")
  if len(columns) > 2 or len({label, *columns}) != len(columns) + 1:
    raise UserError(
      f"config.data.text names {columns} and config.data.label {label!r}: one"
      " or two columns of texts, and another one, are needed."
    )
  return columns, label


def _kind(values: Sequence[Any], texts: Sequence[Any], *, named: bool) -> str:
  """The kind of problem that labels show; `named` says that ids have names."""
  lists = [_as_list(value) for value in values]
  lengths = [len(_words(text)) for text in texts]
  if all(value is not None for value in lists):
    tags = [value for value in lists if value is not None]
    if any(not isinstance(text, str) for text in texts):
      return TAGS
    bio = are_bio(_name(tag) for value in tags for tag in value)
    return TAGS if bio and [*map(len, tags)] == lengths else SEVERAL
  if all(isinstance(value, str) for value in values):
    tags = [value.split() for value in values]
    bio = are_bio(tag for value in tags for tag in value)
    if bio and [*map(len, tags)] == lengths and max(lengths) > 1:
      return TAGS
  numbers = [_number(value) for value in values]
  if named or any(number is None for number in numbers):
    return CLASSES
  integers = all(
    number is not None and number.is_integer() for number in numbers
  )
  return CLASSES if integers and len({*numbers}) <= MOST_CLASSES else NUMBER


def _examples(table: Table, facts: Facts) -> tuple[Table, Examples]:
  """A table's texts and labels, and the table of the rows that have them.

  Raises:
    UserError: it has not all of the columns.
  """
  for name in (*facts.columns, facts.label):
    if name not in table.columns:
      raise UserError(
        f"{table.name} has no column {name!r}; it has {some(table.columns)}."
      )
  ids = {name: i for i, name in enumerate(facts.labels)}
  class_names = table.classes.get(facts.label)

  def read(row: int) -> tuple[list[Any], Any]:
    place = table.place(row)
    texts: list[Any] = []
    for name in facts.columns:
      text = table.columns[name][row]
      if facts.kind == TAGS:
        text = _words(text)
        parts = text
      else:
        parts = [text]
      if not parts or not all(isinstance(p, str) and p.strip() for p in parts):
        is_text = all(isinstance(part, str) for part in parts)
        what = "is empty" if is_text else f"is no text: {text!r}"
        raise UserError(f"{place}: {name} {what}.")
      texts.append(text)
    value = _value(table, row, facts.label, facts.kind)
    label = _label(value, facts, ids, class_names, place)
    if facts.kind == TAGS and len(label) != len(texts[0]):
      raise UserError(f"{place}: {len(label)} tags for {len(texts[0])} words.")
    return texts, label

  table, rows = table.read_each(read)
  labels: Any = [label for _, label in rows]
  if facts.kind != TAGS:
    labels = np.array(labels, np.int32 if facts.kind == CLASSES else np.float32)
  return table, Examples(
    first=[texts[0] for texts, _ in rows],
    second=[texts[1] for texts, _ in rows] if len(facts.columns) > 1 else None,
    labels=labels,
    index=np.arange(len(rows)),
    places=[table.place(row) for row in range(len(rows))],
  )


def _label(
  value: Any,
  facts: Facts,
  ids: dict[str, int],
  class_names: Sequence[str] | None,
  place: str,
) -> Any:
  """A row's label as `Examples` have it: an id, a number, marks or tags.

  Raises:
    UserError: it is none of the labels, or no number.
  """

  def id_of(part: Any) -> int:
    name = _name(part)
    if class_names and isinstance(part, int):
      if not 0 <= part < len(class_names):
        reason = " (-1 marks a row without a label)" if part == -1 else ""
        raise UserError(
          f"{place}: {facts.label} is {part}{reason}; class ids go from 0 to"
          f" {len(class_names) - 1}."
        )
      name = class_names[part]
    if name not in ids:
      raise UserError(
        f"{place}: unknown label {name!r}. The labels are {some(ids)}."
      )
    return ids[name]

  if facts.kind == CLASSES:
    return id_of(value)
  if facts.kind == TAGS:
    return np.array([id_of(tag) for tag in _names(value, TAGS)], np.int32)
  if facts.kind == SEVERAL:
    marks = np.zeros(len(ids), np.float32)
    marks[[id_of(part) for part in _names(value, SEVERAL)]] = 1
    return marks
  number = _number(value)
  if number is None:
    raise UserError(f"{place}: {facts.label} {value!r} is not a number.")
  if abs(number) > LARGEST:
    raise UserError(
      f"{place}: {facts.label} is {number:g}, but a value has room for"
      f" {LARGEST:.1e} at most: scale the values."
    )
  return number


def _dev_rows(examples: Examples, facts: Facts, data: ConfigDict) -> np.ndarray:
  """The rows that are kept for scoring: every class by its share.

  A shuffle by seed is sorted by class, and rows are taken from it at equal
  distances. A class's only row stays in training.
  """
  rows = len(examples)
  size = dev_size(rows, data)
  order = np.random.default_rng(data.subset_seed).permutation(rows)
  if facts.kind == CLASSES:
    ids = np.asarray(examples.labels)
    order = order[np.bincount(ids)[ids[order]] > 1]
    order = order[np.argsort(ids[order], kind="stable")]
  size = min(size, len(order) // 2)
  if size == 0:
    raise UserError(
      f"{rows} training rows are too few to keep some for scoring: name a file"
      " of others, config.data.dev=FILE."
    )
  places = (np.arange(size) + 0.5) * len(order) / size
  return np.sort(order[places.astype(int)])


def _scores(
  config: ConfigDict, facts: Facts, train: Examples
) -> tuple[tuple[str, ...], np.ndarray | None, list[str]]:
  """(metrics, the first one selects; classes' weights; advice for a person).

  Raises:
    UserError: config.select or config.data.class_weights doesn't fit the data.
  """
  metrics: tuple[str, ...] = METRICS.get(facts.kind, ())
  select, weigh = config.select, config.data.class_weights
  choices = SELECT.get(facts.kind, {})
  if select and select not in choices:
    allowed = (
      f"choose from {', '.join(choices)}" if choices else "leave it unset"
    )
    raise UserError(
      f"config.select is {select!r}, but the data are {facts.kind}: {allowed}."
    )
  if weigh not in CLASS_WEIGHTS or (weigh and facts.kind != CLASSES):
    raise UserError(
      f"config.data.class_weights is {weigh!r}, and the data are {facts.kind}:"
      " leave it unset, or for classification choose balanced."
    )
  if select:
    first = choices[select]
    metrics = (first, *(name for name in metrics if name != first))
  if facts.kind != CLASSES:
    return metrics, None, []
  counts = np.bincount(train.labels, minlength=len(facts.labels))
  weights: np.ndarray | None = None
  if weigh:
    if not counts.all():
      raise UserError(
        f"No training row has the label {facts.labels[counts.argmin()]}, so"
        " that config.data.class_weights can't give it a weight."
      )
    # so that all classes count alike, and an example 1 on the average
    weights = (counts.sum() / (len(counts) * counts)).astype(np.float32)
  advice = []
  least, most = counts.argmin(), counts.argmax()
  if counts[most] >= UNLIKE * counts[least] and metrics[0] == "accuracy":
    advice.append(
      f"The classes are unlike in size: {counts[most]:,} training rows are"
      f" {facts.labels[most]} and {counts[least]:,} {facts.labels[least]}, and"
      " accuracy, by which the best epoch is chosen, is mostly of the large"
      " ones. config.select=macro_f1 chooses by all alike, and"
      " config.data.class_weights=balanced trains on all alike."
    )
  return metrics, weights, advice


def _notes(facts: Facts, train: Examples, *, said: str | None) -> list[str]:
  """What was decided, for a run's first lines."""
  what = facts.kind.replace("_", " ")
  if facts.kind == NUMBER:
    values = np.asarray(train.labels)
    what += f" of values from {values.min():g} to {values.max():g}"
  else:
    word = "tags" if facts.kind == TAGS else "labels"
    what += f", {len(facts.labels)} {word}: {some(facts.labels)}"
  if not said:
    what += " (by the labels; config.data.kind=... changes it)"
  lines = [
    f"texts: {' and '.join(facts.columns)}; label: {facts.label}",
    f"kind: {what}",
  ]
  if facts.kind == NUMBER and max(abs(values.mean()), values.std()) > 10:
    lines.append(
      f"The values' mean is {values.mean():.3g}, their spread"
      f" {values.std():.3g}: scaled to a spread near 1 they would train better."
    )
  return lines


def _value(table: Table, row: int, column: str, kind: str | None) -> Any:
  """A row's cell of labels, which has one or may have several.

  Raises:
    UserError: one is missing, or neither a text nor a finite number.
  """
  value = table.columns[column][row]
  if kind == SEVERAL and isinstance(value, str) and not value.strip():
    return value  # a cell of a CSV without labels
  several = None if kind in (CLASSES, NUMBER) else _as_list(value)
  for label in [value] if several is None else several:
    blank = isinstance(label, str) and not label.strip()
    is_float = isinstance(label, float)
    if label is None or blank or (is_float and math.isnan(label)):
      raise UserError(f"{table.place(row)}: {column} is missing.")
    is_label = isinstance(label, str | numbers.Number)
    if not is_label or (is_float and math.isinf(label)):
      raise UserError(
        f"{table.place(row)}: {column} is {label!r}. A label is a text, a"
        " finite number, true or false."
      )
  return value


def _as_list(value: Any) -> list[Any] | None:
  """A list, also one that is written as JSON; None for anything else."""
  if isinstance(value, str) and value.strip().startswith("["):
    try:
      value = parse_json(value)
    except ValueError:
      return None
  return list(value) if isinstance(value, list | tuple) else None


def _words(text: Any) -> list[Any]:
  """A text's words: those of a list, else what stands between spaces."""
  words = _as_list(text)
  if words is not None:
    return words
  return text.split() if isinstance(text, str) else []


def _names(value: Any, kind: str) -> list[Any]:
  """The labels or tags in one cell."""
  parts = _as_list(value)
  if parts is not None:
    return parts
  text = _name(value)
  if kind == TAGS:
    return text.split()
  return [part.strip() for part in SEVERAL_APART.split(text) if part.strip()]


def _number(value: Any) -> float | None:
  """A finite number, or None; true and false are words."""
  if isinstance(value, bool):
    return None
  try:
    number = float(value)
  except (TypeError, ValueError, OverflowError):
    return None
  return number if math.isfinite(number) else None


def _name(value: Any) -> str:
  """A label's name: 1 and 1.0 are the same one, and true is a word."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  return str(value).strip()


def _order(name: str) -> tuple[bool, float, str]:
  """Names sort as numbers where they are numbers."""
  number = _number(name)
  return number is None, number or 0.0, name
