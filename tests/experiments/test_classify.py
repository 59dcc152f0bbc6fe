"""A user's own texts from training to prediction, on a tiny encoder."""

import json

import numpy as np
import pytest

from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.export.hf import write_merged
from vera_jax.pretrained.classifier import load_classifier, restore_adapter
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.predictor import Predictor, text_columns
from vera_jax.train.loop import train_and_evaluate

BRIEF = {"optim.epochs": 1, "optim.batch_size": 8, "vera.rank": 4}


@pytest.fixture(scope="session")
def settings(tiny_model, tmp_path_factory):
  cache = str(tmp_path_factory.mktemp("own_tokens"))
  return {**BRIEF, "model.name": str(tiny_model), "data.cache_dir": cache}


# ml_collections loads config files by it
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_documented_command(settings, tmp_path, typed, capsys):
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
  typed("classify", *flags, f"--workdir={tmp_path / 'run'}")
  shown, remarks = capsys.readouterr()
  said = shown + remarks
  assert "texts: premise and hypothesis; label: label" in said
  assert "kind: classification, 2 labels: no, yes" in said
  assert "text:a, vera" in shown and "macro_f1" in shown
  about = json.loads((tmp_path / "run/adapter/adapter.json").read_text())
  assert about["columns"] == ["premise", "hypothesis"]
  assert (about["kind"], about["labels"]) == ("classification", ["no", "yes"])


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


def test_prediction_knows_columns_and_kind(trained, tmp_path, typed, capsys):
  kind, folder, result = trained
  column = "words" if kind == "token_classification" else "text"
  assert result["kind"] == kind and result["columns"] == [column]
  if kind == "multi_label":
    classifier = restore_adapter(load_adapter(folder / "adapter"))
    assert text_columns(classifier) == (("text",),)
    for answer in Predictor(classifier).answers(["word1 word3", "word4"]):
      pairs = zip(("a", "b"), answer.probabilities, strict=True)
      chosen = tuple(name for name, chance in pairs if chance > 0.5)
      assert answer.labels == chosen and answer.label == "|".join(chosen)
      assert answer.score == max(answer.probabilities)
    return
  file = tmp_path / "a.csv"
  file.write_text('other,words\n1,"word1 word3"\n2,\n3,word4\n')
  with pytest.raises(UserError, match="1 of 4 lines could not be used"):
    typed("predict", f"--adapter={folder / 'adapter'}", f"--input={file}")
  table, remarks = capsys.readouterr()
  assert "line 3: a text is empty" in remarks
  header, one, empty, _ = table.splitlines()
  assert header == "tags\tscores" and empty == ""
  tags, scores = one.split("\t")
  assert set(tags.split()) <= set(result["labels"])
  assert len(tags.split()) == len(scores.split()) == 2


def test_lists_of_words_long_texts_and_merged_weights(trained, tmp_path):
  kind, folder, _ = trained
  if kind != "token_classification":
    pytest.skip("of tags")
  classifier = restore_adapter(load_adapter(folder / "adapter"))
  words = [f"word{i % 7}" for i in range(30)]  # the model has 20 positions
  model = Predictor(classifier)
  answer, short = model.answers([words, ["word1"]])
  assert answer.words == tuple(words) and min(answer.scores) > 0
  write_merged(classifier, tmp_path / "merged")
  merged = load_classifier(tmp_path / "merged")
  assert (merged.kind, merged.labels) == (kind, classifier.labels)
  assert merged.family.classes[kind] == "BertForTokenClassification"
  again, _ = Predictor(merged).answers([words, ["word1"]])
  np.testing.assert_allclose(answer.scores, again.scores, atol=1e-5)
  assert short.words == ("word1",)
  with pytest.raises(UserError, match="tags words, but a bank answers whole"):
    AdapterBank({"a": folder / "adapter"})
