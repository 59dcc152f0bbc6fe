"""The two commands as a user types them, in this process where they work."""

import json

import pytest

from vera_jax.data.tables import read_table
from vera_jax.errors import UserError


def test_merge_then_predict_from_both(random_adapter, tmp_path, typed, capsys):
  adapter, out = random_adapter(), tmp_path / "out"
  file = tmp_path / "texts.tsv"
  file.write_text(
    "sentence1\tsentence2\nword1 word2\tword3\nalone\nword4\tword5\n"
  )
  typed("merge", f"--adapter={adapter}", f"--out={out}")
  done = capsys.readouterr().out
  assert "float32" in done and str(out) in done.replace("\n", "")
  with pytest.raises(UserError, match="1 of 4 lines could not be used."):
    typed("predict", f"--adapter={adapter}", f"--input={file}")
  table, remarks = capsys.readouterr()
  assert "line 3: it has 1 columns" in remarks
  header, first, bad, last = table.splitlines()
  assert header.split("\t") == [
    "label",
    "score",
    "entailment",
    "not_entailment",
  ]
  assert bad == ""
  good = '{"sentence1": "word1 word2", "sentence2": "word3"}'
  listed = tmp_path / "texts.json"  # one list, as training reads it
  listed.write_text(f"[{good},\n3]")
  with pytest.raises(UserError, match="1 of 2 "):
    typed("predict", f"--model={out}", f"--input={listed}", "--format=jsonl")
  lines, remarks = capsys.readouterr()
  assert "row 2: it is no JSON object" in remarks
  answer, bad = map(json.loads, lines.splitlines())
  label, score, *chances = first.split("\t")
  assert answer["label"] == label and bad == {}
  assert answer["score"] == pytest.approx(float(score), abs=2e-6)
  assert list(answer["probabilities"].values()) == pytest.approx(
    [float(chance) for chance in chances], abs=2e-6
  )


def test_labels_that_would_command_a_terminal(
  random_adapter, tmp_path, typed, capsys
):
  """A TSV keeps a line per text and a cell per label; JSON loses nothing."""
  labels = ["\x1b]0;mine\x07a\tb", 'c\n"d"\x9b2J']
  adapter = random_adapter()
  about = json.loads((adapter / "adapter.json").read_text())
  (adapter / "adapter.json").write_text(json.dumps(about | {"labels": labels}))
  file = tmp_path / "texts.tsv"
  file.write_text("sentence1\tsentence2\nword1 word2\tword3\nword4\tword5\n")
  ask = "predict", f"--adapter={adapter}", f"--input={file}"
  typed(*ask)
  table = capsys.readouterr().out
  typed(*ask, "--format=jsonl")
  lines = capsys.readouterr().out
  (tmp_path / "out.tsv").write_text(table)
  found = read_table(tmp_path / "out.tsv")
  shown = [r"\x1b]0;mine\x07a\tb", r'c\n"d"\x9b2J']
  assert list(found.columns) == ["label", "score", *shown]
  answers = list(map(json.loads, lines.splitlines()))
  assert [list(x["probabilities"]) for x in answers] == [labels] * 2
  assert [shown[labels.index(x["label"])] for x in answers] == found.columns[
    "label"
  ]
  assert not set("\x1b\x07\x9b") & set(table + lines)
