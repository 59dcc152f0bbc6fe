"""A user's own texts from training to prediction, on a tiny encoder."""

import json
import sys

import numpy as np
import pytest

from experiments import predict
from tests.experiments.command import refused, run
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.models.classifier import load_classifier, restore_adapter
from vera_jax.models.export_hf import write_merged
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.predictor import Predictor
from vera_jax.train.loop import train_and_evaluate

BRIEF = {"optim.epochs": 1, "optim.batch_size": 8, "vera.rank": 4}


@pytest.fixture(scope="session")
def settings(tiny_model, tmp_path_factory):
  cache = str(tmp_path_factory.mktemp("own_tokens"))
  return {**BRIEF, "model.name": str(tiny_model), "data.cache_dir": cache}


def test_the_documented_command(settings, tmp_path):
  """Pairs in two CSV files; the folder's name and the labels' come out."""
  rows = [f'"word{i}, word1",word{i},{("no", "yes")[i % 2]}' for i in range(16)]
  for name, part in (("a.csv", rows), ("b.csv", rows[:6])):
    text = "\n".join(["premise,hypothesis,label", *part, ""])
    (tmp_path / name).write_text(text)
  flags = [
    "--config=configs/text.py",
    f"--config.data.train={tmp_path / 'a.csv'}",
    f"--config.data.dev={tmp_path / 'b.csv'}",
    "--config.data.text=('premise','hypothesis')",
    "--config.data.label=label",
    *(f"--config.{name}={value}" for name, value in settings.items()),
  ]
  done = run("classify", *flags, f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 0, done.stderr
  said = done.stdout + done.stderr
  assert "texts: premise and hypothesis; label: label" in said
  assert "kind: classification, 2 labels: no, yes" in said
  assert "text:a, vera" in done.stdout and "macro_f1" in done.stdout
  about = json.loads((tmp_path / "run/adapter/adapter.json").read_text())
  assert about["columns"] == ["premise", "hypothesis"]
  assert (about["kind"], about["labels"]) == ("classification", ["no", "yes"])
  (tmp_path / "b.csv").write_text("premise,hypothesis,label\nx,y,maybe\n")
  message = refused("classify", 1, *flags, f"--workdir={tmp_path / 'other'}")
  assert message == (
    f"{tmp_path / 'b.csv'}:2: unknown label 'maybe'. The labels are no, yes.\n"
  )


ROWS = {
  "multi_label": [
    {"text": f"word{i} word2", "label": [["a"], ["a", "b"], []][i % 3]}
    for i in range(20)
  ],
  "token_classification": [
    {"words": ["word1", f"word{i}"], "tags": ["B-X", "O"]} for i in range(20)
  ],
}


@pytest.fixture(scope="session", params=ROWS)
def trained(request, settings, tmp_path_factory):
  """(kind, the run's folder, its result) of training on lines of JSON."""
  from configs import text

  folder = tmp_path_factory.mktemp(request.param)
  lines = [json.dumps(row) + "\n" for row in ROWS[request.param]]
  (folder / "train.jsonl").write_text("".join(lines))
  config = text.get_config()
  config.update_from_flattened_dict(settings)
  config.data.train = str(folder / "train.jsonl")
  result = train_and_evaluate(config, folder / "run")
  (folder / "train.jsonl").unlink()  # no longer needed, for a finished run too
  assert train_and_evaluate(config, folder / "run") == result
  return request.param, folder / "run", result


def read_answers(capsys, monkeypatch, *flags):
  """What predict prints, as lines."""
  with monkeypatch.context() as patch:
    patch.setattr(sys, "argv", ["predict", *map(str, flags)])
    predict.flags.FLAGS(sys.argv)
    try:
      predict.main()
    finally:
      predict.flags.FLAGS.unparse_flags()
      for flag in flags:  # back to what they are without a command line
        name = flag.removeprefix("--").partition("=")[0]
        predict.flags.FLAGS[name].unparse()
  return capsys.readouterr().out.splitlines()


def test_prediction_knows_columns_and_kind(
  trained, tmp_path, capsys, monkeypatch
):
  kind, folder, result = trained
  column = "words" if kind == "token_classification" else "text"
  assert result["kind"] == kind and result["columns"] == [column]
  (tmp_path / "a.csv").write_text(
    f'other,{column}\n1,"word1 word3"\n2,\n3,word4\n'
  )
  adapter = load_adapter(folder / "adapter")
  merged = tmp_path / "merged"
  write_merged(restore_adapter(adapter), merged)
  whole = load_classifier(merged)
  assert whole.kind == kind and whole.labels == tuple(result["labels"])
  (merged / "merge.json").unlink()
  assert load_classifier(merged).kind == kind  # by config.json alone
  texts = ["word1 word3", "word4"]
  found = [
    Predictor(each).answers(texts) for each in (restore_adapter(adapter), whole)
  ]
  first = found[0][0]
  if kind == "multi_label":
    assert first.labels == tuple(
      name
      for name, chance in zip(("a", "b"), first.probabilities, strict=True)
      if chance > 0.5
    )
    values = [[answer.probabilities for answer in each] for each in found]
  else:
    assert first.words == ("word1", "word3") and len(first.tags) == 2
    values = [[chance for a in each for chance in a.scores] for each in found]
  np.testing.assert_allclose(*values, atol=1e-5)

  flags = [f"--adapter={folder / 'adapter'}", f"--input={tmp_path / 'a.csv'}"]
  with pytest.raises(UserError, match="1 of 4 lines could not be used"):
    read_answers(capsys, monkeypatch, *flags)
  out = capsys.readouterr()
  header, one, empty, _ = out.out.splitlines()
  assert out.err == "line 3: a text is empty\n" and empty == ""
  if kind == "multi_label":
    assert header.split("\t") == ["label", "score", "a", "b"]
    assert one.split("\t")[0] == first.label
  else:
    assert header == "tags\tscores"
    assert one.split("\t")[0] == " ".join(first.tags)
  (tmp_path / "a.csv").write_text("other,texts\n1,word1\n")
  with pytest.raises(UserError, match=f"no column {column}; its columns are o"):
    read_answers(capsys, monkeypatch, *flags)


def test_lists_of_words_and_long_texts_are_tagged(trained):
  kind, folder, _ = trained
  if kind != "token_classification":
    pytest.skip("of tags")
  classifier = restore_adapter(load_adapter(folder / "adapter"))
  words = [f"word{i % 7}" for i in range(30)]  # the model has 20 positions
  model = Predictor(classifier)
  answer, short = model.answers([words, ["word1"]])
  assert answer.words == tuple(words) and min(answer.scores) > 0
  pieces = model.answers([words[:18], words[18:]])
  together = [score for piece in pieces for score in piece.scores]
  np.testing.assert_allclose(answer.scores, together, atol=1e-5)
  assert short.tags == model.answers(["word1"])[0].tags
  with pytest.raises(UserError, match="tags words, but a bank answers whole"):
    AdapterBank({"a": folder / "adapter"})
