"""E2E from its rows to scored texts, on a tiny decoder."""

import shutil

import jax
import numpy as np
import pytest

from configs import e2e
from experiments import cli, closing
from tests.tasks.decoder_files import GPT2, write_decoder
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.tasks import e2e_metrics
from vera_jax.tasks.e2e import generate, hold_out, task_for
from vera_jax.tasks.e2e_files import Pairs, read_for_scoring
from vera_jax.tasks.e2e_metrics import score_texts
from vera_jax.train.ensemble import train_ensemble
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.setup import build_setup

BRIEF = {
  "optim.epochs": 2,
  "optim.adapter_lr": 0.2,
  "vera.rank": 4,
  "data.max_length": 12,
  "data.max_eval_examples": 3,
  "generate.beams": 3,
  "generate.no_repeat_ngram": 2,
  "generate.max_new_tokens": 5,
  "generate.rows": 2,
  "log.every": 1,
}


@pytest.fixture(scope="module", autouse=True)
def no_java():
  """Java's programs take seconds to start; test_e2e_metrics.py has them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(e2e_metrics, "without_java", lambda: "no Java here")
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The decoder, and two rows for each of some inputs."""
  folder = tmp_path_factory.mktemp("e2e")
  (folder / "model").mkdir()
  write_decoder(folder / "model", {**GPT2, "n_layer": 1})
  for split, inputs in {"train": 8, "valid": 4, "test": 5}.items():
    rows = [
      f"word{i} word{i + 1}||word{i + 2 + k} word1 \n"
      for i in range(inputs)
      for k in range(2)
    ]
    (folder / f"{split}.txt").write_text("".join(rows))
  return folder


@pytest.fixture(scope="module")
def config(folder):
  config = e2e.get_config("medium")
  config.update_from_flattened_dict(BRIEF)
  config.model.name = str(folder / "model")
  config.data.source = str(folder)
  config.data.cache_dir = str(folder / "cache")
  return config


@pytest.fixture(scope="module")
def trained(config, folder):
  return train_and_evaluate(config, folder / "run")


def changed(config, **changes):
  config = config.copy_and_resolve_references()
  flat = {name.replace("__", "."): x for name, x in changes.items()}
  config.update_from_flattened_dict(flat)
  return config


def written(folder):
  return read_for_scoring(folder / "outputs.txt", folder / "references.txt")


def test_the_last_epochs_texts_are_scored_and_kept(trained, folder):
  assert trained["best"] == trained["last"] == trained["history"][-1]
  first, last = (epoch["metrics"]["loss"] for epoch in trained["history"])
  assert last != first
  test = trained["test"]
  outputs, references = written(folder / "run/test")
  assert len(outputs) == test["inputs"] == 3 and any(outputs)
  inputs = (folder / "run/test/inputs.txt").read_text().splitlines()
  for one, texts in zip(inputs, references, strict=True):
    number = int(one.partition(" ")[0].removeprefix("word"))
    assert texts == [f"word{number + 2 + k} word1" for k in range(2)]
  assert test["scores"] == score_texts(outputs, references).values
  assert test["missing"] == "no Java here"
  assert set(test["scores"]) == {"BLEU", "NIST", "NIST_perl"}


def test_the_saved_adapter_writes_the_same(trained, config, folder, capsys):
  model = restore_adapter(load_adapter(folder / "run/adapter"))
  inputs = (folder / "run/test/inputs.txt").read_text().splitlines()
  found, _ = generate(model, inputs, settings=config.generate.to_dict())
  assert list(found.values()) == written(folder / "run/test")[0]
  first, last = capsys.readouterr().err.splitlines()  # two inputs at a time
  assert first.startswith("test texts: 2 of 3, ") and first.endswith(" left")
  assert last == "test texts: 3 of 3, 0 s left"


@pytest.mark.slow
def test_an_ensembles_runs_write_as_those_alone(trained, config, folder):
  # on parts of the devices the last bits, and so words, may be other ones
  configs = cli.with_seeds(changed(config, mesh__runs=1), (0, 1))
  folders = [folder / f"seed{seed}" for seed in (0, 1)]
  one, other = train_ensemble(configs, folders)
  assert one["test"]["scores"] == trained["test"]["scores"]
  assert written(folders[0] / "test") == written(folder / "run/test")
  assert other["history"] != one["history"]
  assert written(folders[1] / "test")[1] == written(folder / "run/test")[1]


@pytest.mark.slow
def test_a_run_that_was_lost_while_it_wrote_writes_the_same(
  trained, config, folder
):
  again = folder / "again"
  shutil.copytree(folder / "run", again)
  (again / "result.json").unlink()
  shutil.rmtree(again / "test")
  found = train_and_evaluate(config, again)
  assert found["test"]["scores"] == trained["test"]["scores"]
  assert written(again / "test") == written(folder / "run/test")


@pytest.mark.slow
def test_an_adapter_is_kept_when_its_texts_can_not_be_written(
  config, folder, monkeypatch, capsys
):
  """Whatever happens then; what a user could mend is said in the result."""
  own = changed(
    config,
    generate__max_new_tokens=99,
    optim__epochs=1,
    data__max_train_examples=8,
  )
  run, message = folder / "without", "INTERNAL: a bug"

  def broken(*args, **settings):
    raise jax.errors.JaxRuntimeError(message)

  with monkeypatch.context() as patch:
    patch.setattr("vera_jax.tasks.e2e.generate", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
      train_and_evaluate(own, run)
    assert not (run / "result.json").exists()
    saved = load_adapter(run / "adapter")
  result = train_and_evaluate(own, run)  # trained already
  assert result["test"]["scores"] == {} and result["test"]["inputs"] == 0
  assert "with 99 new ones they are more than" in result["test"]["missing"]
  again = load_adapter(run / "adapter")
  for name, leaf in saved.tensors.items():
    np.testing.assert_array_equal(again.tensors[name], leaf)
  closing.show_result(result, run)
  closing.show_seeds([result], [run])
  shown = " ".join(capsys.readouterr().out.split())
  assert shown.count("The run's texts were not written") == 2
  # too little memory for texts is no reason to begin again either
  message = "RESOURCE_EXHAUSTED: Out of memory"
  with monkeypatch.context() as patch:
    patch.setattr("vera_jax.tasks.e2e.generate", broken)
    (run / "result.json").unlink()
    result = train_and_evaluate(own, run)
  assert message in result["test"]["missing"]


def test_rows_become_tokens_as_in_lora(config):
  """Input, end of text, text, end of text; the latter two are learned."""
  task = task_for(config)
  data = build_setup(config).data
  assert task.head == "language_modelling" and not task.selects
  tokens = data.tokens["train"]
  end, word0 = 0, 3
  row = [word0, word0 + 1, end, word0 + 2, word0 + 1, end]
  assert tokens.ids[: len(row)].tolist() == row
  assert tokens.learned[: len(row)].tolist() == [False] * 3 + [True] * 3


def test_held_out_inputs_are_not_trained_on(config):
  rows = Pairs([f"i{n // 3}" for n in range(30)], [f"t{n}" for n in range(30)])
  rest, apart = hold_out(rows, 4, seed=0)
  assert len(rest.inputs) == 30 - 4 * 3 and len(apart.inputs) == 4
  assert not set(rest.inputs) & set(apart.inputs)
  firsts = rows.grouped()
  assert apart.texts == [firsts[one][0] for one in apart.inputs]
  assert hold_out(rows, 4, seed=0) == (rest, apart)
  assert hold_out(rows, 4, seed=1)[1] != apart
  for number in (0, 10):
    with pytest.raises(UserError, match="of the 10 inputs of train.txt"):
      hold_out(rows, number, seed=0)
  # in place of valid.txt
  data = build_setup(changed(config, data__held_out=2)).data
  assert len(data.tokens["valid"]) == 2
  assert len(data.tokens["train"]) == 16 - 2 * 2


def test_an_input_is_put_into_a_prompt(config):
  asked = changed(config, data__prompt="word9 {} word8", data__separate=False)
  tokens = build_setup(asked).data.tokens["train"]
  assert tokens.ids[:4].tolist() == [12, 3, 4, 11]
  assert task_for(asked).stored["separate"] is False


@pytest.mark.parametrize(
  "change, message",
  [
    ({"data__source": ""}, "Name E2E's data"),
    ({"data__source": "nowhere"}, "no file nowhere/train.txt"),
    ({"data__max_eval_examples": 0}, "max_eval_examples is 0"),
    ({"data__prompt": "no place"}, "needs one {}"),
    ({"optim__label_smoothing": 1.0}, "label_smoothing is 1.0"),
    ({"generate__beams": 0}, "config.generate: beams is 0"),
    ({"generate__rows": 0}, "generate.rows is 0"),
    ({"generate__max_new_tokens": 0}, "generate.max_new_tokens is 0"),
  ],
)
def test_settings_that_can_not_work(change, message, config):
  with pytest.raises(UserError, match=message):
    task_for(changed(config, **change))


def test_without_test_texts_nothing_is_written(config):
  task = task_for(changed(config, data__test=False))
  assert task.write_texts is None
  assert task.presentation.notes == ("valid: 3 rows of valid.txt",)
