"""A user's texts: lines, tables, what is decided and what is refused."""

import json

import pytest

from configs import language
from vera_jax.data.examples import subset
from vera_jax.errors import UserError
from vera_jax.tasks import language_files
from vera_jax.tasks.task import task_for, task_named


@pytest.fixture
def read(tmp_path, monkeypatch):
  """(task, its examples by split) of the content of files."""
  make = language_files.language_modelling

  def found(name, content, dev=None, **settings):
    config = language.get_config()
    for split, text in (("train", content), ("dev", dev)):
      if text is not None:
        path = tmp_path / f"{split}{name}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        config.data[split] = str(path)
    optim = settings.pop("optim", {})
    config.data.update(settings)
    config.optim.update(optim)
    kept = {}

    def keep(name, *, read_split, **facts):
      kept.update({split: read_split("", split) for split in ("train", "dev")})
      return make(name, read_split=read_split, **facts)

    monkeypatch.setattr(language_files, "language_modelling", keep)
    return task_for(config), kept

  return found


def lines(*rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


PAIRS = [{"prompt": f"p{i}", "completion": f" c{i}", "n": i} for i in range(20)]


def test_lines_of_a_plain_file(read):
  task, found = read(
    "s.txt", "\ufeffone\n\n  two words \nthree\n", dev="four\n"
  )
  assert found["train"].first == ["one", "two words", "three"]
  assert found["train"].second is None and found["dev"].first == ["four"]
  assert task.name == "language:trains" and task.presentation.size[:2] == (3, 1)
  assert task.presentation.notes[0] == "texts: text; learned: all of it"
  assert (task.head, task.outputs, task.labels) == ("language_modelling", 0, ())


def test_prompts_and_completions(read):
  task, found = read(".jsonl", lines(*PAIRS), dev_fraction=0.2, cut="left")
  assert (
    task.presentation.notes[0]
    == "texts: prompt and completion; learned: completion alone"
  )
  assert "dev: 4 of the 20 training rows" in task.presentation.notes[1]
  both = [*found["train"].first, *found["dev"].first]
  assert sorted(both) == sorted(row["prompt"] for row in PAIRS)
  for part in found.values():
    assert part.second == [p.replace("p", " c") for p in part.first]
  assert task.stored["columns"] == ["prompt", "completion"]
  assert task.stored["completions"] == {"cut": "left", "separate": False}
  again = read(".jsonl", lines(*PAIRS), dev_fraction=0.2)[1]
  assert again["dev"].first == found["dev"].first
  other = read(".jsonl", lines(*PAIRS), dev_fraction=0.2, subset_seed=1)[1]
  assert other["dev"].first != found["dev"].first


def test_the_estimate_is_of_the_rows_that_are_trained_on(read):
  for share in (0.1, 0.5):
    task, found = read(".txt", "a b c d e\n" * 20, dev_fraction=share)
    assert task.presentation.size == (len(found["train"]), len(found["dev"]), 8)


def test_an_example_keeps_its_line(read):
  """Behind a hold-out and in a subset, whatever lines are blank."""
  content = lines(*PAIRS[:3]) + "\n\n" + lines(*PAIRS[3:])
  _, found = read(".jsonl", content, dev_fraction=0.2)
  for part in (*found.values(), subset(found["train"], 5, seed=1)):
    for prompt, place in zip(part.first, part.places, strict=True):
      number = int(prompt.removeprefix("p"))
      line = number + (1 if number < 3 else 3)
      assert place.endswith(f"train.jsonl:{line}")


def test_other_columns_and_a_csv(read):
  _, found = read(".csv", "a,b\nx,y\nz,v\n", text=("b", "a"))
  assert found["train"].first + found["dev"].first in (["y", "v"], ["v", "y"])
  _, found = read(".csv", "story\nx\nz\n")
  assert {*found["train"].first, *found["dev"].first} == {"x", "z"}


@pytest.mark.parametrize(
  "name, content, settings, message",
  [
    (".txt", b"one\n\xff\n", {}, r"train.txt:2: it is not UTF-8"),
    (".txt", "one\n", {}, "One training row can't be learned and scored"),
    (".csv", "a,b\nx,y\n", {}, "not clear which column is to be learned"),
    (".csv", "a,b\nx,y\n", {"text": ("c",)}, "has no column 'c'; it has a, b"),
    (".csv", "text,n\nx,1\n ,2\n", {}, r"csv:3: text: it is empty"),
    (".txt", "a\nb\n", {"dev_fraction": 0.9}, "above 0 and up to 0.5"),
    (".txt", "a\nb\n", {"optim": {"label_smoothing": 1.0}}, "to below 1"),
  ],
)
def test_what_is_refused(name, content, settings, message, read):
  with pytest.raises(UserError, match=message):
    read(name, content, **settings)


def test_bad_lines_are_said_together_or_left_out(read):
  content = b"one\n\xff\ntwo\nthree\n\xfe\n"
  with pytest.raises(UserError, match="2 of 5 rows can't be used") as error:
    read(".txt", content)
  assert all(
    f"train.txt:{n}: it is not UTF-8" in str(error.value) for n in (2, 5)
  )
  task, left = read(".txt", content, dev="four\n", skip_bad_rows=True)
  assert left["train"].first == ["one", "two", "three"]
  assert task.stored["skipped_rows"] == {"train": 2}


def test_without_a_file_it_asks_for_one(read, tmp_path):
  config = language.get_config()
  with pytest.raises(UserError, match="Name the texts: config.data.train=FILE"):
    task_for(config)
  with pytest.raises(UserError, match="needs the data to be known"):
    task_named("language")
  config.data.train = str(tmp_path / "none.txt")
  with pytest.raises(UserError, match="There is no .*none.txt"):
    task_for(config)
  config.predict_test = True
  with pytest.raises(UserError, match="predict_test is for benchmarks"):
    task_for(config)
