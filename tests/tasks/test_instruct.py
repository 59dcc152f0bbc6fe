"""Instruction tuning from rows to answers, on a tiny Llama."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import instruct
from tests.models.gguf_folders import random_folder
from tests.tasks.decoder_files import tokenizer_of_words
from vera_jax.adapters.files import load_adapter
from vera_jax.data.chat import Rendered
from vera_jax.data.completions import begin_of_text
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.data.written import read_written
from vera_jax.errors import UserError
from vera_jax.export.gguf import write_gguf_of
from vera_jax.generate.choices import log_likelihoods
from vera_jax.generate.conversation import conversation_ids
from vera_jax.generate.generator import Generator
from vera_jax.generate.sampling import GREEDY
from vera_jax.models.gguf_folder import gguf_folder
from vera_jax.operations.quantised import is_quantised
from vera_jax.pretrained.classifier import load_classifier, restore_adapter
from vera_jax.serve.questions import (
  JudgeQuestion,
  answer_turns,
  as_line,
  read_judge_questions,
)
from vera_jax.tasks.instruct import as_examples, rouge_l, task_for
from vera_jax.tasks.instruct_files import read_splits
from vera_jax.tasks.language_modelling import loss
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.setup import build_setup
from vera_jax.train.step import outputs_of

TEMPLATE = (
  "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
  "{% if add_generation_prompt %}assistant {% endif %}"
)
# of one word, as long as a text may be and longer; of a hundred lines more
GENERAL = ["word3", " ".join(["word1 word5"] * 6), "word2 word4 " * 9]
BRIEF = {
  "model.quantise": "keep",
  "optim.epochs": 2,
  "optim.batch_size": 8,
  "optim.microbatch_rows": None,
  "optim.adapter_lr": 0.1,
  "vera.rank": 4,
  "data.template": "chat",
  "data.max_length": 12,
  "data.dev_examples": 4,
  "data.max_test_examples": 3,
  "generate.max_new_tokens": 4,
  "generate.rows": 2,
  "log.every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The decoder in eight-bit codes, the rows and questions of COPA's form."""
  folder = tmp_path_factory.mktemp("instruct")
  random_folder(folder / "dense", "llama", max_position_embeddings=24)
  file = folder / "a.gguf"
  write_gguf_of(folder / "dense", file, kind="gguf-q8_0")
  # the folder of the file, with a tokenizer of whole words
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HOME", str(folder / "home"))
    shutil.copytree(gguf_folder(file), folder / "model", symlinks=True)
  tokenizer = tokenizer_of_words(pad_token="<end>")
  tokenizer.chat_template = TEMPLATE
  tokenizer.save_pretrained(folder / "model")
  rows = [
    {"instruction": f"word{i}", "output": f"word{i + 1} word1 " + "word2 " * k}
    for k in range(2)
    for i in range(12)
  ]
  (folder / "rows.json").write_text(json.dumps(rows))
  copa = {"premise": "word1.", "choice1": "word2", "choice2": "word3 word4"}
  line = json.dumps({**copa, "question": "cause", "label": 1})
  (folder / "copa.jsonl").write_text(line)
  (folder / "general.txt").write_text("\n".join(GENERAL + ["word0"] * 99))
  return folder


@pytest.fixture(scope="module")
def config(folder):
  config = instruct.get_config("llama_7b")
  config.update_from_flattened_dict(BRIEF)
  config.model.name = str(folder / "model")
  config.data.source = str(folder / "rows.json")
  config.data.choices = (str(folder / "copa.jsonl"),)
  config.data.general = str(folder / "general.txt")
  config.data.cache_dir = str(folder / "cache")
  return config


def changed(config, **changes):
  config = config.copy_and_resolve_references()
  flat = {name.replace("__", "."): x for name, x in changes.items()}
  config.update_from_flattened_dict(flat)
  return config


@pytest.fixture(scope="module")
def trained(config, folder):
  return train_and_evaluate(config, folder / "run")


def test_a_run_learns_and_keeps_its_answers(trained, folder):
  first, last = (epoch["metrics"]["loss"] for epoch in trained["history"])
  assert last < first and trained["task"] == "instruct:rows"
  assert trained["score_name"] == "token_probability"
  assert set(trained["best"]["metrics"]) >= {"perplexity", "token_accuracy"}
  assert trained["data"]["dev"]["examples"] == 4
  lines = (folder / "run/test/answers.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert len(found) == trained["test"]["inputs"] == 3
  answers = [line["answer"] for line in found]
  scores = trained["test"]["scores"]
  assert scores["ROUGE_L"] == rouge_l(answers, [x["reference"] for x in found])
  assert {scores["copa accuracy"], scores["copa accuracy, normalised"]} <= {
    0,
    1,
  }
  kept = read_written(folder / "run")
  assert list(kept.outputs.values()) == [" ".join(a.split()) for a in answers]
  # the same by the saved adapter, asked as a user does
  saved = load_adapter(folder / "run/adapter")
  assert saved.about["template"] == "chat"
  card = (folder / "run/adapter/README.md").read_text()
  assert "| prompts are put into the template | chat |" in card
  asked = [line["messages"][-1]["content"] for line in found]
  for codes in (False, True):  # merged into dense kernels, or beside the codes
    generator = Generator(restore_adapter(saved, codes=codes), rows=2)
    kernels = flatten_dict(generator.decoder.params).values()
    assert any(map(is_quantised, kernels)) == codes
    # in a loop over layers one of them is dequantised at a time
    assert getattr(generator.module, "model", generator.module).scan == codes
    again = generator.texts(asked, how=GREEDY, max_new_tokens=4)
    assert [text.strip() for text in again] == answers


def test_what_is_forgotten_of_general_texts(trained, folder):
  """The losses are those of the base and of the saved adapter."""
  assert trained["data"]["general"]["examples"] == 100
  begins = "<s>" if begin_of_text(load_tokenizer(folder / "model")) else ""
  room = 12 - bool(begins)
  texts = [" ".join(text.split()[:room]) for text in GENERAL]
  texts += ["word0"] * 97
  tokens = sum(len(text.split()) - (not begins) for text in texts)
  spans = [Rendered(text, [(0, len(text))]) for text in texts]
  adapter = restore_adapter(load_adapter(folder / "run/adapter"))
  base = load_classifier(folder / "model")
  before, after = (
    -log_likelihoods(model, spans).sum() / tokens for model in (base, adapter)
  )
  general = trained["general"]
  assert general["before"] == pytest.approx(before, rel=1e-5)
  assert general["after"] == pytest.approx(after, rel=1e-5)
  assert general["forgetting"] == general["after"] - general["before"] != 0


def test_every_learned_token_weighs_the_same_however_they_are_packed(config):
  setup = build_setup(changed(config, optim__batch_size=20))
  module, names = setup.model.blueprint.module, setup.model.blueprint.inputs
  params = setup.first_state(setup.config).params
  _, batches = next(setup.data.train_batches(seeds=0, start_step=0))

  @jax.jit
  def summed(batch):
    found = outputs_of(module, tuple(names), params, setup.frozen, batch)
    return loss(found[0], batch)

  sums = [summed(setup.put_batch(batch)) for batch in batches]
  total, count = (float(sum(side)) for side in zip(*sums, strict=True))
  tokens = setup.data.tokens["train"]
  assert count == tokens.learned.sum() == tokens.reads.sum()
  alone = 0.0
  for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
    reads = np.flatnonzero(tokens.learned[a:b]) - 1
    row = {
      "input_ids": jnp.asarray(tokens.ids[a:b])[None],
      "positions": jnp.arange(b - a)[None],
      "segment_ids": jnp.ones((1, b - a), jnp.int32),
      "read_positions": jnp.asarray(reads)[None],
      "labels": jnp.asarray(tokens.ids[a:b][reads + 1])[None],
      "weights": jnp.ones((1, len(reads))),
    }
    alone += float(summed(row)[0])
  assert total == pytest.approx(alone, rel=1e-5)


def test_a_row_is_known_by_its_line(config, tmp_path):
  rows = [{"prompt": f"word{i}", "completion": "word1"} for i in range(3)]
  path = tmp_path / "d.jsonl"
  path.write_text("\n\n" + "\n".join(map(json.dumps, rows)))
  data = {**config.data.to_dict(), "source": str(path), "dev": str(path)}
  splits = read_splits(ConfigDict(data))
  for template in ("chat", "plain"):
    assert as_examples(splits.dev, template).places == [
      f"{path}:{line}" for line in (3, 4, 5)
    ]


def test_settings_that_can_not_be_are_refused(config, monkeypatch):
  with pytest.raises(UserError, match="'llama'; choose chat, alpaca, plain"):
    task_for(changed(config, data__template="llama"))
  with pytest.raises(UserError, match="generate.rows is 0; 1 is the least"):
    task_for(changed(config, generate__rows=0))
  with pytest.raises(UserError, match="There is no file of choices none.jsonl"):
    task_for(changed(config, data__choices=("none.jsonl",)))
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match="needs rouge-score: pip install .*instr"):
    task_for(config)
  assert task_for(changed(config, data__max_test_examples=0)) is not None


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
  found = rouge_l(["the cat on mat", "no"], ["the cat sat on the mat", "yes"])
  assert found == pytest.approx((2 * 1 * 4 / 6 / (1 + 4 / 6) + 0) / 2)
  # lower-cased, and no other letters than a to z
  assert rouge_l(["Sch, N!"], ["schön"]) == 1
  assert rouge_l(["Привет мир"], ["Привет мир"]) == 0


@pytest.mark.slow
def test_scores_that_can_not_be_made_are_named_beside_the_others(
  config, folder, tmp_path
):
  """A choice without room, and references in which ROUGE-L sees no word."""
  row = {"premise": "word1 " * 30, "choice1": "a", "choice2": "b", "label": 0}
  long = tmp_path / "long.jsonl"
  long.write_text(json.dumps({**row, "question": "cause"}))
  rows = [{"prompt": f"word{i}", "completion": "слово"} for i in range(8)]
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  both = (str(long), *config.data.choices)
  own = changed(
    config,
    data__source=str(tmp_path / "rows.json"),
    data__choices=both,
    optim__epochs=1,
  )
  test = train_and_evaluate(own, tmp_path / "run")["test"]
  assert set(test["scores"]) == {"copa accuracy", "copa accuracy, normalised"}
  assert "There is no ROUGE_L" in test["missing"]
  assert "long was not scored: A question with a choice has" in test["missing"]
  assert test["inputs"] == 3 and (tmp_path / "run/adapter").is_dir()
  (tmp_path / "other").mkdir()
  other = tmp_path / "other/long.jsonl"
  other.write_text(long.read_text())
  own.data.choices = (str(long), str(other))
  with pytest.raises(UserError, match=f"{long} and {other} would both be"):
    task_for(own)


def test_questions_are_answered_in_fastchats_form(folder, tmp_path):
  lines = [
    {"question_id": 81, "category": "math", "turns": ["word1", "word2"]},
    {"question_id": 1, "category": "generic", "text": "word3"},
  ]
  path = tmp_path / "question.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  questions = read_judge_questions(path)
  generator = Generator(load_classifier(folder / "model"), template="chat")

  def answers(**settings):
    return [*answer_turns(generator, questions, **settings)]

  one, other = answers(greedy=True, max_new_tokens=3)
  assert (len(one.turns), len(other.turns)) == (2, 1)
  assert one.shortened == other.shortened == 0
  messages = [
    {"role": "user", "content": "word1"},
    {"role": "assistant", "content": one.turns[0]},
    {"role": "user", "content": "word2"},
  ]
  ids = conversation_ids(generator.tokenizer, messages, template="chat")
  [second] = generator.ids([ids], max_new_tokens=3)
  assert generator.decode(second).strip() == one.turns[1]
  line = as_line(questions[0], one.turns, model_id="tiny")
  assert line["question_id"] == 81 and line["model_id"] == "tiny"
  assert line["choices"] == [{"index": 0, "turns": one.turns}]
  assert line["answer_id"] and line["tstamp"] > 0
  # drawn by the category's temperature, and the same for a seed
  drawn = [answers(max_new_tokens=3, seed=seed) for seed in (1, 1, 2, 3)]
  assert drawn[0] == drawn[1] and drawn[0][0] == one
  assert any(found[1] != drawn[0][1] for found in drawn)
  # a turn has the room that is left behind its prompt, or none
  long = JudgeQuestion(5, "", ("word1 " * 18, "word2"))
  [found] = answer_turns(generator, [long], greedy=True, max_new_tokens=12)
  message = {"role": "user", "content": long.turns[0]}
  ids = conversation_ids(generator.tokenizer, [message], template="chat")
  [first] = generator.ids([ids], max_new_tokens=generator.decoder.room - 21)
  assert len(ids) == 21
  assert found == ([generator.decode(first).strip(), ""], 2)
  path.write_text('{"question_id": 3, "turns": []}\n')
  with pytest.raises(UserError, match="question.jsonl:1: a question has"):
    read_judge_questions(path)
