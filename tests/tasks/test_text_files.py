"""A user's own files: what is decided about them, and what is refused."""

import json

import numpy as np
import pytest

from configs import text
from vera_jax.errors import UserError
from vera_jax.models.kinds import CLASSES, NUMBER, SEVERAL, TAGS
from vera_jax.tasks import text_files
from vera_jax.tasks.task import task_for, task_named


@pytest.fixture
def decide(tmp_path):
  """What is found in rows of JSON, or in the text of a CSV."""

  def found(rows, dev=None, select=None, **settings):
    config = text.get_config()
    config.select = select
    for split, content in (("train", rows), ("dev", dev)):
      if content is not None:
        is_csv = isinstance(content, str)
        path = tmp_path / f"{split}.{'csv' if is_csv else 'jsonl'}"
        lines = [content] if is_csv else map(json.dumps, content)
        path.write_text("\n".join(lines))
        config.data[split] = str(path)
    config.data.update(settings)
    examples = {}

    def keep(name, *, read_split, dev_splits, **facts):
      for split in ("train", *dev_splits):
        examples[split] = read_split("", split)
      return make[facts.get("kind", TAGS)](
        name, read_split=read_split, dev_splits=dev_splits, **facts
      )

    make = dict.fromkeys((CLASSES, NUMBER, SEVERAL), text_files.classification)
    make[TAGS] = text_files.tagging
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(text_files, "classification", keep)
      patch.setattr(text_files, "tagging", keep)
      return task_for(config), examples

  return found


def rows(*labels, **more):
  """A text for each label, ten times."""
  return [
    {"text": f"text {i}", "label": label, **more}
    for i, label in enumerate(labels * 10)
  ]


WORDS = [
  {"tokens": ["Anna", "is", "here"], "tags": ["B-PER", "O", "O"]},
  {"tokens": ["Hello"], "tags": ["O"]},
] * 5


@pytest.mark.parametrize(
  "data, kind, labels",
  [
    (rows("good", "bad"), CLASSES, ("bad", "good")),
    (rows(2, 10, 0), CLASSES, ("0", "2", "10")),
    (rows(True, False), CLASSES, ("false", "true")),
    (rows(1.0, 2.0), CLASSES, ("1", "2")),
    (rows(0.5, 2.0), NUMBER, ()),
    (rows(*range(30)), NUMBER, ()),
    (rows(["a", "b"], [], ["c"]), SEVERAL, ("a", "b", "c")),
    (WORDS, TAGS, ("O", "B-PER", "I-PER")),
    ("text,label\nx y,B-A O\nz v,O O\n" * 1, TAGS, ("O", "B-A", "I-A")),
    ("text,label\n" + "x,1\ny,0\n" * 5, CLASSES, ("0", "1")),
    ("text,label\n" + "x,1.5\ny,0\n" * 5, NUMBER, ()),
    ('text,label\n"x","[""b""]"\ny,[]\n', SEVERAL, ("b",)),
    ("text,label\n" + "x,O\ny,A\n" * 5, CLASSES, ("A", "O")),
  ],
)
def test_kind_and_labels_are_found(data, kind, labels, decide):
  task, examples = decide(data)
  assert (task.kind, task.labels) == (kind, labels)
  assert task.outputs == (len(labels) or 1)
  both = [examples[split] for split in ("train", "dev")]
  count = len(data) if isinstance(data, list) else data.count("\n") - 1
  assert sum(map(len, both)) == count == sum(task.presentation.size[:2])


def test_labels_are_ids_marks_numbers_and_tags(decide):
  (task, found) = decide(rows("b", "a"), dev=rows("a", "b")[:2])
  assert found["dev"].labels.tolist() == [0, 1]
  assert found["dev"].labels.dtype == np.int32
  _, found = decide(rows(["b"], ["a", "b"]), dev=rows([], ["a"])[:2])
  assert found["dev"].labels.tolist() == [[0, 0], [1, 0]]
  _, found = decide(rows(0.5, 1), dev=rows(7)[:1])
  assert (
    found["dev"].labels.tolist() == [7] and found["dev"].labels.dtype == "f4"
  )
  task, found = decide(WORDS, dev=WORDS[:2])
  assert [t.tolist() for t in found["dev"].labels] == [[1, 0, 0], [0]]
  assert found["dev"].first == [["Anna", "is", "here"], ["Hello"]]
  assert task.head == "token_classification"
  assert task.stored == {"columns": ["tokens"]}


def test_what_is_said_goes_before_what_is_found(decide):
  data = rows(1, 2, other="x", premise="p")
  task, found = decide(
    data, kind=NUMBER, text=("other", "premise"), label="label"
  )
  assert task.kind == NUMBER and task.presentation.columns == (
    ("other", "premise"),
  )
  assert found["train"].second[0] == "p"
  task, _ = decide(data, text=("text",), labels=("2", "1"))
  assert task.labels == ("2", "1")
  task, _ = decide("text,label\n" + "x,b|a\ny,\n" * 5, kind=SEVERAL)
  assert task.labels == ("a", "b")
  lines = " ".join(task.presentation.notes)
  assert "texts: text; label: label" in lines
  assert "multi label, 2 labels: a, b" in lines and "dev: 1 of the 10" in lines


def test_class_ids_have_the_names_of_the_file(tmp_path):
  import datasets

  path = tmp_path / "train.parquet"
  names = datasets.ClassLabel(names=["no", "yes"])
  features = {"text": datasets.Value("string"), "label": names}
  data = {"text": list("abcd"), "label": [1, 0, 1, 0]}
  features = datasets.Features(features)
  datasets.Dataset.from_dict(data, features=features).to_parquet(path)
  config = text.get_config()
  config.data.source = str(tmp_path)  # a folder with train and dev
  assert task_for(config).labels == ("no", "yes")


def test_a_data_set_of_the_hub(monkeypatch):
  import datasets

  def split(*labels):
    features = {"text": datasets.Value("string")}
    features["label"] = datasets.ClassLabel(names=["no", "yes"])
    data = {"text": ["a"] * len(labels), "label": list(labels)}
    return datasets.Dataset.from_dict(
      data, features=datasets.Features(features)
    )

  asked = []
  splits = {"train": split(0, 1, 1), "validation": split(1), "test": split(-1)}
  monkeypatch.setattr(
    text_files, "download", lambda *names: asked.append(names) or splits
  )
  config = text.get_config()
  config.data.train = "owner/name:part"
  task = task_for(config)
  assert task.name == "text:name" and task.labels == ("no", "yes")
  assert asked == [("owner/name", "part")] and task.presentation.size[:2] == (
    3,
    1,
  )
  splits["train"] = split(0, 1, -1)
  message = r"owner/name:part \(train\), row 3: label is -1 \(-1 marks a row"
  with pytest.raises(UserError, match=message):
    task_for(config)


GOOD = "text,label\nx,a\ny,b\nz,a\n"


@pytest.mark.parametrize(
  "data, dev, settings, message",
  [
    (GOOD + "v,\n", None, {}, r"train.csv:5: label is missing"),
    (GOOD + "v\n", None, {}, r"train.csv:5: it has 1 columns"),
    (GOOD, "text,label\nx,c\n", {}, r"dev.csv:2: unknown label 'c'. .* a, b"),
    (GOOD, None, {"kind": NUMBER}, r"train.csv:2: label 'a' is not a number"),
    (GOOD, None, {"label": "no"}, "no column 'no'. The columns .* text"),
    (GOOD, None, {"dev_fraction": 0.9}, "dev_fraction is 0.9"),
    ("text,label\nx,a\ny,a\n", None, {}, "only the label a"),
    ("text,note\nx,a\n", None, {}, "which column is the label"),
    ("a,b,label\nx,y,1\n", None, {}, "which column holds the texts"),
    (rows(*map(str, range(30)), "x"), GOOD, {}, None),
    (rows(float("nan"), 1.5), None, {}, "jsonl:1: label is missing"),
    (rows("x", ["x"]), None, {}, r"jsonl:2: label is \['x'\]. A label is"),
    (rows(["x"], [["x"]]), None, {}, r"l:2: label is \['x'\]. A label is a t"),
    (rows(0.5, float("inf")), None, {}, "jsonl:2: label is inf. A label is"),
    (rows(0.5, -1e39), None, {}, r"l:2: label is -1e\+39, but .* 3.4e\+38"),
    (GOOD, None, {"labels": ("a", "b", "a")}, "names a label twice: a, b, a"),
    ([*WORDS, {"tokens": ["a"], "tags": ["O"] * 2}], None, {}, "2 tags for 1"),
  ],
)
def test_bad_data_are_named(data, dev, settings, message, decide):
  if message is None:
    distinct = [{**row, "label": f"l{i}"} for i, row in enumerate(data)]
    message = "has 310 different values in 310 rows"
    data, dev = distinct, None
  with pytest.raises(UserError, match=message):
    decide(data, dev, **settings)


def test_bad_rows_are_said_together_or_left_out(decide):
  """Of both files, whatever is wrong with the rows, in one message."""
  many = "".join(f"x{i},a,b,c\n" for i in range(12))
  train = GOOD + "v,\nw,a,b\n ,b\n" + GOOD.partition("\n")[2] + many
  dev = GOOD + "x,c\n"
  with pytest.raises(UserError) as error:
    decide(train, dev)
  said = str(error.value)
  for words in (
    "train.csv: 15 of 21 rows can't be used.\n",
    "train.csv:5: label is missing.\n",
    "train.csv:6: it has 3 columns, but the header has 2 (text, label).\n",
    "train.csv:7: text is empty.\n",
    "and 5 more\n",
    "dev.csv: 1 of 4 rows can't be used.\n",
    "dev.csv:5: unknown label 'c'. The labels are a, b.\n",
    "config.data.skip_bad_rows=True",
  ):
    assert words in said
  task, left = decide(train, dev, skip_bad_rows=True)
  assert left["train"].first == [*"xyz", *"xyz"]
  assert left["train"].places[3].endswith("train.csv:8")
  assert left["dev"].first == [*"xyz"] and task.labels == ("a", "b")
  assert task.stored["skipped_rows"] == {"train": 15, "dev": 1}
  assert any("15 rows of" in note for note in task.presentation.notes)
  with pytest.raises(UserError, match="dev.csv: 1 of 1 rows can't be used"):
    decide(GOOD, "text,label\nx,c\n", skip_bad_rows=True)
  task, _ = decide(GOOD, skip_bad_rows=True)
  assert "skipped_rows" not in task.stored


def test_classes_that_are_unlike_in_size(decide):
  many = rows(*["a"] * 9, "b")
  task, _ = decide(many)
  [advice] = [x for x in task.presentation.notes if "unlike in size" in x]
  assert "81 training rows are a and 9 b" in advice  # a tenth is scored
  assert task.score_name == "accuracy"
  task, _ = decide(many, select="macro_f1")
  assert task.score_name == "macro_f1"
  assert not any("unlike" in note for note in task.presentation.notes)
  for name, metric in (("loss", "label_probability"), ("matthews",) * 2):
    assert decide(many, select=name)[0].score_name == metric
  numbers = rows(0.5, 1.5, 2.5)
  assert decide(numbers, select="loss")[0].score_name == "r2"
  for data, select in ((many, "pearson"), (numbers, "macro_f1"), (WORDS, "f1")):
    with pytest.raises(UserError, match=f"config.select is '{select}', but"):
      decide(data, select=select)
  decide(many, class_weights="balanced")
  for data, weights in ((many, "equal"), (numbers, "balanced")):
    with pytest.raises(UserError, match=f"class_weights is '{weights}', and"):
      decide(data, class_weights=weights)
  with pytest.raises(UserError, match="No training row has the label c"):
    decide(many, class_weights="balanced", labels=("a", "b", "c"))


def test_the_dev_part_is_by_seed_and_by_class(decide):
  data = rows(*["a"] * 8, "b", "b") + [{"text": "only", "label": "c"}]
  _, found = decide(data)
  again = decide(data)[1]
  other = decide(data, subset_seed=1)[1]
  dev = found["dev"]
  assert dev.first == again["dev"].first != other["dev"].first
  assert not set(dev.first) & set(found["train"].first)
  counts = np.bincount(dev.labels, minlength=3)
  assert counts.tolist() == [8, 2, 0]  # of 80, 20 and the only one


def test_other_names_and_missing_data():
  with pytest.raises(UserError, match="needs the data to be known"):
    task_named("text")
  config = text.get_config()
  with pytest.raises(UserError, match="Name the data: config.data.train=FILE"):
    task_for(config)
  config.predict_test = True
  with pytest.raises(UserError, match="vera-jax predict"):
    task_for(config)
