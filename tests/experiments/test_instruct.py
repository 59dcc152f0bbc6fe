"""The commands for instructions, as a user types them."""

import json

import pytest

from tests.tasks.decoder_files import GPT2, write_decoder
from vera_jax.errors import UserError

ROWS = [{"prompt": f"word{i} ", "completion": "word1"} for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("instruct")
  (folder / "model").mkdir()
  write_decoder(folder / "model", {**GPT2, "n_layer": 1})
  lines = [json.dumps(row) + "\n" for row in ROWS]
  (folder / "rows.jsonl").write_text("".join(lines))
  # one question twice, each of its choices right once: half is right
  arc = {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}}
  keyed = [json.dumps({**arc, "answerKey": key}) + "\n" for key in "AB"]
  (folder / "arc.jsonl").write_text("".join(keyed))
  asked = {"question_id": 1, "turns": ["word1", "word2"]}
  (folder / "question.jsonl").write_text(json.dumps(asked))
  return folder


# ml_collections loads config files by it
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_preview_shows_what_is_learned_and_trains_nothing(
  folder, tmp_path, typed, capsys
):
  words = (
    "--config=configs/instruct.py:llama2_7b",
    f"--config.model.name={folder / 'model'}",
    f"--config.data.source={folder / 'rows.jsonl'}",
    f"--config.data.cache_dir={folder / 'cache'}",
    "--config.data.dev_examples=1",
    f"--workdir={tmp_path / 'run'}",
  )
  typed("instruct", *words, "--config.data.template=plain", "--preview=2")
  shown = capsys.readouterr().out
  assert "rows: completion, put into the template 'plain'" in shown
  assert "dev: 1 of the 4 rows" in shown
  assert shown.count("⟦ word1 <end>⟧") == 2
  assert "example 2, " in shown and "example 3" not in shown
  assert "rows.jsonl:2: 3 tokens, 2 learned" in shown
  typed("instruct", *words, "--config.data.template=plain", "--preview")
  assert "example 3, " in capsys.readouterr().out
  assert not (tmp_path / "run").exists()
  with pytest.raises(UserError, match="has no chat template.*template=alpaca"):
    typed("instruct", *words, "--config.data.template=chat", "--preview")
  with pytest.raises(UserError, match="--preview=0; give 1 or more"):
    typed("instruct", *words, "--preview=0")


def test_questions_are_answered(folder, tmp_path, typed, capsys):
  model, out = f"--model={folder / 'model'}", tmp_path / "new/answers.jsonl"
  asked = f"--questions={folder / 'question.jsonl'}"
  some = ("--template=plain", "--max_new_tokens=3", "--greedy")
  typed("answer", model, asked, f"--out={out}", *some)
  assert f"1 questions, 2 turns: {out}" in capsys.readouterr().out
  [line] = map(json.loads, out.read_text().splitlines())
  assert line["model_id"] == "model" and len(line["choices"][0]["turns"]) == 2
  # answers are kept, whatever else is asked for
  written = out.read_bytes()
  with pytest.raises(UserError, match=f"{out} has answers, which are not repl"):
    typed("answer", model, asked, f"--out={out}", *some)
  assert out.read_bytes() == written
  out = tmp_path / "other.jsonl"
  out.touch()
  # there is room for 24 tokens, and the second turn's prompt has two or more
  some = ("--template=plain", "--max_new_tokens=23", "--greedy")
  typed("answer", model, asked, f"--out={out}", *some)
  assert "1 turns had room for fewer new tokens" in capsys.readouterr().out
  [line] = map(json.loads, out.read_text().splitlines())
  assert len(line["choices"][0]["turns"]) == 2
  typed("answer", model, f"--choices={folder / 'arc.jsonl'}")
  assert "0.5000" in capsys.readouterr().out
  twice = f"--choices={folder / 'arc.jsonl'},{folder / 'arc.jsonl'}"
  with pytest.raises(UserError, match="would both be called 'arc'"):
    typed("answer", model, twice)
  with pytest.raises(UserError, match="either --questions"):
    typed("answer", model)
  with pytest.raises(UserError, match="name both files"):
    typed("answer", model, asked)
