"""SuperGLUE's files, forms, hub route and submissions; COPA's choices."""

import json
import shutil
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.superglue import cb
from configs.sweeps import rank
from tests.conftest import TINY
from tests.tasks.superglue_files import SPLITS, write_superglue
from vera_jax.adapters.files import load_adapter
from vera_jax.data.examples import Examples, subset
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.serve.predictor import Predictor
from vera_jax.sweep.plan import make_plan
from vera_jax.tasks.glue_data import load_split, write_submission
from vera_jax.tasks.superglue import TASKS
from vera_jax.tasks.task import task_named
from vera_jax.train.loop import train_and_evaluate

HUB = "aps/super_glue"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_superglue(tmp_path_factory.mktemp("superglue"))


def rows_of(folder, name, split="train"):
  lines = (folder / name / f"{split}.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


ASKED = {"cause": "What was the cause of this?"}
ASKED["effect"] = "What happened as a result?"


def copa_pairs(row):
  asked = f"{row['premise']} {ASKED[row['question']]}"
  return [(asked, row["choice1"]), (asked, row["choice2"])]


FORMS = {  # what the model reads for a row, and the label's id
  "boolq": lambda r: ([(r["question"], r["passage"])], int(r["label"])),
  "cb": lambda r: (
    [(r["premise"], r["hypothesis"])],
    ["entailment", "contradiction", "neutral"].index(r["label"]),
  ),
  "copa": lambda r: (copa_pairs(r), r["label"]),
  "rte": lambda r: (
    [(r["premise"], r["hypothesis"])],
    ["entailment", "not_entailment"].index(r["label"]),
  ),
  "wic": lambda r: (
    [(f"{r['word']}: {r['sentence1']}", r["sentence2"])],
    int(r["label"]),
  ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_row_of_the_files(folder, name):
  facts = TASKS[f"superglue_{name}"]
  rows = rows_of(folder, facts.folder)
  texts, labels = zip(*map(FORMS[name], rows), strict=True)
  for source in (folder, folder / facts.folder):
    found = load_split(facts, source, "train")
    pairs = list(zip(found.first, found.second, strict=True))
    assert pairs == [pair for row in texts for pair in row]
    assert found.labels.tolist() == list(labels)
    assert found.labels.dtype == np.int32
    assert len(found) == SPLITS["train"]
    assert found.choices == (2 if name == "copa" else 1)
  assert len(load_split(facts, folder, "validation")) == SPLITS["val"]
  test = load_split(facts, folder, "test")
  assert test.labels is None
  assert test.index.tolist() == list(range(100, 100 + SPLITS["test"]))


GOOD = {
  "cb": '{"premise": "a", "hypothesis": "b", "label": "neutral"}',
  "copa": '{"premise": "a", "choice1": "b", "choice2": "c",'
  ' "question": "cause", "label": 1}',
  "boolq": '{"question": "a", "passage": "b", "label": true}',
}
BAD = [
  ("cb", GOOD["cb"][:-1], "no JSON"),
  ("cb", '{"premise": "a", "label": "neutral"}', "no 'hypothesis'; the keys"),
  ("cb", GOOD["cb"].replace("neutral", "-"), "label '-' .*contradiction"),
  ("cb", GOOD["cb"].replace('"b"', '"\\ud800"'), "not UTF-8"),
  ("cb", '{"premise": "a", "hypothesis": "b"}', r"label null \(missing"),
  ("cb", GOOD["cb"].replace("a", "\udce9"), "not UTF-8"),
  ("copa", GOOD["copa"].replace("cause", "why"), "question is 'why'; it is"),
  ("copa", GOOD["copa"].replace("1}", "true}"), "label true"),
  ("boolq", GOOD["boolq"].replace("true", "1"), "label 1 .*false, true"),
]


@pytest.mark.parametrize("name, line, message", BAD)
def test_a_bad_line_is_named(tmp_path, name, line, message):
  text = f"{GOOD[name]}\n{line}\n{GOOD[name]}\n"
  data = text.encode(errors="surrogateescape")  # a byte that is not UTF-8
  (tmp_path / "train.jsonl").write_bytes(data)
  with pytest.raises(UserError, match=f"train.jsonl:2: .*{message}") as error:
    load_split(TASKS[f"superglue_{name}"], tmp_path, "train")
  assert str(tmp_path) in str(error.value)


def test_what_is_missing(tmp_path):
  cb = TASKS["superglue_cb"]
  with pytest.raises(UserError, match=r"train.jsonl, val.jsonl, .* CB/"):
    load_split(cb, tmp_path, "train")
  with pytest.raises(UserError, match="no such folder"):
    load_split(cb, tmp_path / "nowhere", "train")
  (tmp_path / "train.jsonl").write_text("")
  with pytest.raises(UserError, match="has no examples"):
    load_split(cb, tmp_path, "train")
  (tmp_path / "test.jsonl").write_text('{"premise": "a", "hypothesis": "b"}\n')
  with pytest.raises(UserError, match=r"test.jsonl:1: idx None is not a whole"):
    load_split(cb, tmp_path, "test")
  row = {"premise": "a", "hypothesis": "b", "idx": 2**63}
  (tmp_path / "test.jsonl").write_text(json.dumps(row))
  with pytest.raises(UserError, match=r"is not a whole number below 2\*\*63"):
    load_split(cb, tmp_path, "test")


@pytest.mark.parametrize("name", FORMS)
def test_the_hub_gives_what_the_files_give(folder, name, monkeypatch):
  facts = TASKS[f"superglue_{name}"]
  splits = {}
  for split, file in {"train": "train", "test": "test"}.items():
    rows = rows_of(folder, facts.folder, file)
    for row in rows:
      row["label"] = FORMS[name](row)[1] if split == "train" else -1
    splits[split] = datasets.Dataset.from_list(rows)
  asked = []

  def load(*given):
    asked.append(given)
    return datasets.DatasetDict(splits)

  monkeypatch.setattr(datasets, "load_dataset", load)
  for split in splits:
    there, here = (load_split(facts, place, split) for place in (HUB, folder))
    assert (there.first, there.second) == (here.first, here.second)
    assert there.choices == here.choices
    np.testing.assert_array_equal(there.index, here.index)
    np.testing.assert_array_equal(there.labels, here.labels)
  assert set(asked) == {(HUB, name)}


def test_a_bad_row_on_the_hub(monkeypatch):
  row = {**json.loads(GOOD["copa"]), "question": "why", "idx": 0}
  data = datasets.DatasetDict(train=datasets.Dataset.from_list([row]))
  monkeypatch.setattr(datasets, "load_dataset", lambda *_: data)
  with pytest.raises(UserError, match=r"\(copa, train\), row 1: question is"):
    load_split(TASKS["superglue_copa"], HUB, "train")


@pytest.mark.parametrize(
  "name, labels",
  [
    ("boolq", ["false", "true"]),
    ("cb", ["entailment", "contradiction", "neutral"]),
    ("copa", [0, 1]),
    ("rte", ["entailment", "not_entailment"]),
    ("wic", ["false", "true"]),
  ],
)
def test_submissions(tmp_path, name, labels):
  facts = TASKS[f"superglue_{name}"]
  ids = np.arange(len(labels))
  path = write_submission(tmp_path / "new", facts, "test", ids, 7 + ids)
  assert path.name == f"{facts.folder}.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  expected = [{"idx": 7 + i, "label": x} for i, x in enumerate(labels)]
  assert lines == expected
  with pytest.raises(ValueError):
    write_submission(tmp_path, facts, "test", np.array([0]), np.array([0, 1]))


def test_a_subset_keeps_an_examples_choices():
  first = [f"{i}.{c}" for i in range(6) for c in range(3)]
  whole = Examples(first, first, np.arange(6), np.arange(6), choices=3)
  part = subset(whole, 4, 0)
  assert len(whole) == 6 and len(part) == 4 and part.choices == 3
  expected = [f"{i}.{c}" for i in part.labels for c in range(3)]
  assert part.first == part.second == expected


@pytest.fixture(scope="module")
def shrink(folder, tiny_settings, tiny_model, tmp_path_factory):
  """Makes a config small: an encoder of one layer, four steps an epoch."""
  model = tmp_path_factory.mktemp("one_layer") / "model"
  shutil.copytree(tiny_model, model)
  fields = {**TINY, "num_hidden_layers": 1}
  (model / "config.json").write_text(json.dumps(fields))
  settings = {
    **tiny_settings,
    "model.name": str(model),
    "data.source": str(folder),
    "data.max_length": 20,
    "optim.epochs": 1,
    "optim.batch_size": 6,
  }
  del settings["vera.rank"]

  def make(config):
    config.update_from_flattened_dict(settings)
    return config

  return make


@pytest.fixture(scope="module")
def copa_run(shrink, tmp_path_factory):
  """A run of the small rank study, on COPA. Look, don't touch."""
  workdir = tmp_path_factory.mktemp("rank")
  runs = make_plan(rank.get_config("superglue_small"), workdir).runs
  config = next(
    run.config
    for run in runs
    if run.config.task == "superglue_copa" and run.config.vera.rank == 16
  )
  config = shrink(config)
  config.predict_test = True
  result = train_and_evaluate(config, workdir / "run")
  return SimpleNamespace(config=config, workdir=workdir / "run", result=result)


@pytest.fixture(scope="module")
def copa_predictor(copa_run):
  saved = load_adapter(copa_run.workdir / "adapter")
  return Predictor(restore_adapter(saved))


def columns_of(rows):
  names = TASKS["superglue_copa"].columns
  return [[row[name] for row in rows] for name in names]


def test_copa_trains_and_predict_gives_the_runs_answers(
  folder, copa_run, copa_predictor
):
  """Of dev and test set in one call, and each a soft-max over its choices."""
  dev, test = rows_of(folder, "COPA", "val"), rows_of(folder, "COPA", "test")
  answers = copa_predictor.answers(*columns_of(dev + test))
  assert copa_run.result["score_name"] == "accuracy"
  assert copa_run.result["data"]["train"]["examples"] == SPLITS["train"]
  labels = [f"choice{1 + row['label']}" for row in dev]
  right = np.array([answer.label for answer in answers[: len(dev)]]) == labels
  assert copa_run.result["best"]["score"] == pytest.approx(right.mean())
  path = copa_run.workdir / "submission" / "COPA.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  names = ["choice1", "choice2"]
  assert lines == [
    {"idx": row["idx"], "label": names.index(answer.label)}
    for row, answer in zip(test, answers[len(dev) :], strict=True)
  ]
  pairs = [pair for row in dev + test for pair in copa_pairs(row)]
  scores = copa_predictor.logits(*map(list, zip(*pairs, strict=True)))
  for answer, (one, two) in zip(answers, scores.reshape(-1, 2), strict=True):
    chance = 1 / (1 + np.exp(one - two))
    expected = (1 - chance, chance)
    np.testing.assert_allclose(answer.probabilities, expected, atol=1e-5)
    assert answer.score == max(answer.probabilities)


def test_what_copa_can_not_be_asked(copa_predictor):
  with pytest.raises(UserError, match="premise, choice1.* give 4 lists"):
    copa_predictor.answers(["a"], ["b"])
  with pytest.raises(UserError, match="all of one length"):
    copa_predictor.answers(["a"], ["b"], ["c"], ["cause", "cause"])
  with pytest.raises(UserError, match="Example 2: question is 'why'"):
    copa_predictor.answers(["a"] * 2, ["b"] * 2, ["c"] * 2, ["cause", "why"])


def test_packed_choices_are_what_each_is_alone(copa_run, copa_predictor):
  """Logits and loss, against one text per padded row and a loss by hand."""
  classifier = copa_predictor.classifier
  task = task_named("superglue_copa")
  data = task.load(copa_run.config, classifier.folder, shards=8)
  tokens = data.tokens["train"]
  padded = np.full((2 * len(tokens), 20), tokens.pad_id, np.int32)
  types = np.zeros_like(padded)
  for i, length in enumerate(tokens.text_lengths):
    text = slice(tokens.offsets[i], tokens.offsets[i + 1])
    padded[i, :length] = tokens.ids[text]
    types[i, :length] = tokens.token_types[text]
  apply = jax.jit(classifier.module.apply)
  alone = np.asarray(apply(classifier.variables, padded, types)).reshape(-1, 2)
  shifted = alone - alone.max(-1, keepdims=True)
  chances = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
  losses = -np.log(chances[np.arange(len(tokens)), tokens.labels])

  _, microbatches = next(data.train_batches(seeds=0, start_step=0))
  total = count = 0.0
  seen = []
  for batch in microbatches:
    inputs = {name: batch[name] for name in classifier.inputs}
    outputs = apply(classifier.variables, **inputs)
    batch = jax.tree.map(jnp.asarray, batch)
    sums = task.loss(outputs, batch)
    total, count = total + float(sums[0]), count + float(sums[1])
    real = np.asarray(batch["example"]) >= 0
    examples = np.asarray(batch["example"])[real]
    logits = np.asarray(task.measure(outputs, batch))[real]
    np.testing.assert_allclose(logits, alone[examples], rtol=0, atol=1e-5)
    seen += examples.tolist()
  assert count == len(seen) == len(set(seen)) == data.batch_size
  np.testing.assert_allclose(total, losses[seen].sum(), rtol=1e-5)
  assert np.ptp(alone) > 1e-3


@pytest.mark.slow
def test_cb_trains_and_is_scored_by_the_mean(shrink, tmp_path):
  config = shrink(cb.get_config("minilm"))
  config.vera.rank = 8
  metrics = train_and_evaluate(config, tmp_path / "run")["best"]["metrics"]
  assert list(metrics) == ["accuracy_f1", "accuracy", "macro_f1"]
  mean = (metrics["accuracy"] + metrics["macro_f1"]) / 2
  assert metrics["accuracy_f1"] == pytest.approx(mean)
