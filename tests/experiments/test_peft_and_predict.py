"""An adapter goes to PEFT's form and back, and answers files as before."""

import json
import shutil

import pytest

from tests.peft_io.folders import LORA, matrices, write
from tests.pictures import COLOURS, picture
from tests.tasks.decoder_files import GPT2, write_decoder
from vera_jax.errors import UserError


@pytest.fixture
def printed(typed, capsys):
  """What a command prints."""

  def run(*words):
    typed(*words)
    return capsys.readouterr().out

  return run


def there_and_back(printed, adapter, tmp_path, *words):
  for way, source, to in (
    ("export", adapter, "theirs"),
    ("import", tmp_path / "theirs", "ours"),
  ):
    given = words if way == "import" else ()
    printed(
      "peft", way, f"--adapter={source}", f"--out={tmp_path / to}", *given
    )
  return tmp_path / "ours"


# (of adapter.json, the file's name, what is in it)
FILES = {
  "classes": ({"task": "mrpc"}, "x.tsv", "word1\tword2 word3\nword4\tword5\n"),
  "several labels": (
    {"task": "text:films", "columns": ["film"], "kind": "multi_label"},
    "x.csv",
    'number,film\n3,"word1 word2"\n',
  ),
  "choices": (
    {"task": "superglue_copa", "kind": "classification", "labels": []},
    "x.jsonl",
    '{"premise": "word1.", "choice1": "word2.", "choice2": "word3.",'
    ' "question": "cause"}\n',
  ),
}


@pytest.mark.parametrize(
  "kind",
  [
    "classes",
    "choices",
    pytest.param("several labels", marks=pytest.mark.slow),
  ],
)
def test_an_adapter_answers_files_as_before(
  kind, random_adapter, printed, monkeypatch, tmp_path
):
  fields, name, text = FILES[kind]
  of = "stsb" if kind == "choices" else "mrpc"
  adapter = random_adapter("lora", task=of)
  path = adapter / "adapter.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  (tmp_path / name).write_text(text)
  given = f"--input={tmp_path / name}"
  ours = there_and_back(printed, adapter, tmp_path)
  before = printed("predict", f"--adapter={adapter}", given)

  def fetched(name, *, files, **_):
    there = [file.name for file in (tmp_path / "theirs").iterdir()]
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for file in {*there} & {*files}:
      shutil.copy(tmp_path / "theirs" / file, folder)
    return folder

  monkeypatch.setattr("vera_jax.adapters.files.snapshot", fetched)
  # PEFT's is imported for it, here by its id on the hub
  for name in (ours, "owner/theirs"):
    assert printed("predict", f"--adapter={name}", given) == before
  assert len(before.splitlines()) == len(text.splitlines())


def test_images_are_answered_as_before(
  tiny_vit, random_adapter, printed, tmp_path
):
  adapter = random_adapter("lora", base=tiny_vit, task="mnli")
  path = adapter / "adapter.json"
  fields = json.loads(path.read_text()) | {"task": "images", "image_size": 16}
  path.write_text(json.dumps(fields))
  picture(COLOURS["red"], 1).save(tmp_path / "x.png")
  given = f"--input={tmp_path / 'x.png'}"
  ours = there_and_back(printed, adapter, tmp_path)
  before = printed("predict", f"--adapter={adapter}", given)
  assert printed("predict", f"--adapter={ours}", given) == before
  assert before.splitlines()[1].startswith(f"{tmp_path / 'x.png'}\t")


def test_prompts_are_put_where_training_put_them(
  random_adapter, printed, tmp_path
):
  base = tmp_path / "base"
  base.mkdir()
  write_decoder(base, {**GPT2, "n_layer": 1})
  adapter = random_adapter(
    "lora", base=base, kind="language_modelling", targets=["c_attn"]
  )
  path = adapter / "adapter.json"
  fields = json.loads(path.read_text()) | {"task": "instruct"}
  path.write_text(json.dumps(fields | {"template": "alpaca"}))
  words = "--prompt=word1", "--max_new_tokens=3"
  ours = there_and_back(printed, adapter, tmp_path)
  before = printed("generate", f"--adapter={adapter}", *words)
  plain = printed(
    "generate", f"--adapter={adapter}", "--template=plain", *words
  )
  assert printed("generate", f"--adapter={ours}", *words) == before != plain
  theirs = f"--adapter={tmp_path / 'theirs'}"
  with pytest.raises(UserError, match="mrpc needs a head for classification"):
    printed("peft", "import", theirs, f"--out={tmp_path / 'no'}", "--task=mrpc")


def test_a_named_task_says_how_files_are_read(printed, tiny_model, tmp_path):
  """Of an adapter that PEFT made, which says nothing about its texts."""
  theirs = write(tmp_path / "theirs", matrices(), LORA)
  base, ours = f"--base={tiny_model}", tmp_path / "ours"
  words = f"--adapter={theirs}", base, "--task=mrpc"
  printed("peft", "import", f"--out={ours}", *words)
  fields = json.loads((ours / "adapter.json").read_text())
  assert {k for k, x in fields.items() if x is None} == {
    "max_length",  # as long as the model has room
    "projection_digest",
  }
  answers = []
  for name, text in (
    ("bare.tsv", "word1\tword2\n"),
    ("header.tsv", "sentence2\tsentence1\nword2\tword1\n"),
    ("x.jsonl", '{"sentence1": "word1", "sentence2": "word2"}\n'),
  ):
    (tmp_path / name).write_text(text)
    given = f"--input={tmp_path / name}"
    answers.append(printed("predict", f"--adapter={ours}", given).split()[-4:])
  assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 4
  # files written before, with a null for what isn't known
  path = ours / "adapter.json"
  path.write_text(json.dumps(fields | {"columns": None, "kind": None}))
  given = f"--input={tmp_path / 'bare.tsv'}"
  assert printed("predict", f"--adapter={ours}", given).split() == answers[0]
  path.write_text(json.dumps(fields | {"columns": "text"}))
  with pytest.raises(UserError, match="no usable columns: 'text'"):
    printed("predict", f"--adapter={ours}", given)
