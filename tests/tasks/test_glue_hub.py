"""Splits from the hub, with `datasets.load_dataset` replaced: no network."""

import time
from unittest.mock import Mock

import datasets
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from vera_jax.data import hub_data
from vera_jax.errors import UserError
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.glue_facts import TASKS

HUB = "nyu-mll/glue"


@pytest.fixture
def hub(monkeypatch):
  """Puts a DatasetDict where the hub's would be."""

  def put(**splits):
    data = datasets.DatasetDict(
      {name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda source, task: data)

  return put


@pytest.fixture
def online(monkeypatch, tmp_path):
  """As with a network and an empty cache, to test what is asked."""
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def rows(**columns):
  return {"idx": [4, 9], **columns}


def test_pairs_and_their_labels(hub):
  hub(
    train=rows(sentence1=["a", "b"], sentence2=["c", "d"], label=[1, 0]),
    test=rows(sentence1=["a", "b"], sentence2=["c", "d"], label=[-1, -1]),
  )
  train = load_split(TASKS["rte"], HUB, "train")
  assert (train.first, train.second) == (["a", "b"], ["c", "d"])
  assert train.labels.tolist() == [1, 0] and train.labels.dtype == np.int32
  assert train.index.tolist() == [4, 9]
  assert load_split(TASKS["rte"], HUB, "test").labels is None


@pytest.mark.parametrize(
  "name, columns, message",
  [
    ("cola", {"sentence": ["a", "b"], "label": [1, -1]}, "row 2: .* without a"),
    ("cola", {"sentence": ["a", "b"]}, "no column 'label'"),
    ("cola", {"text": ["a", "b"], "label": [1, 0]}, "no column 'sentence'"),
    (
      "stsb",
      {"sentence1": ["a"] * 2, "sentence2": ["b"] * 2, "label": [6.0, 1.0]},
      "row 1: score 6.0 is not a number from 0 to 5",
    ),
  ],
)
def test_bad_rows(hub, name, columns, message):
  hub(train=rows(**columns))
  with pytest.raises(UserError, match=message):
    load_split(TASKS[name], HUB, "train")


def test_an_empty_split(hub):
  hub(train={"sentence": [], "label": [], "idx": []})
  with pytest.raises(UserError, match=r"\(cola, train\) has no examples"):
    load_split(TASKS["cola"], HUB, "train")


def test_offline_names_both_settings():
  with pytest.raises(UserError, match="can't be reached") as error:
    load_split(TASKS["rte"], "nobody/no-such-data", "train")
  assert "config.data.source" in str(error.value)
  assert "config.model.name" in str(error.value)


def test_a_hub_that_refuses_the_connection(online, monkeypatch):
  ask = Mock(side_effect=ConnectionError("refused"))
  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
  with pytest.raises(UserError, match=r"can't be reached .*refused"):
    load_split(TASKS["rte"], HUB, "train")


def test_a_hub_that_never_answers(online, monkeypatch):
  monkeypatch.setattr(hub_data, "ANSWER_SECONDS", 0.05)
  monkeypatch.setattr(
    huggingface_hub.HfApi, "dataset_info", lambda *_, **__: time.sleep(1)
  )
  with pytest.raises(UserError, match=r"can't be reached .*no answer"):
    load_split(TASKS["rte"], HUB, "train")


def test_a_hub_without_that_data(online, monkeypatch):
  error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
  monkeypatch.setattr(
    huggingface_hub.HfApi, "dataset_info", Mock(side_effect=error)
  )
  with pytest.raises(
    UserError, match="folder nobody/nothing here, and the hub"
  ):
    load_split(TASKS["rte"], "nobody/nothing", "train")


def test_an_earlier_download_serves_without_asking(
  online, hub, monkeypatch, tmp_path
):
  (tmp_path / "nyu-mll___glue").mkdir()
  ask = Mock(side_effect=AssertionError("asked"))
  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
  hub(train=rows(sentence=["a", "b"], label=[0, 1]))
  assert len(load_split(TASKS["cola"], HUB, "train")) == 2
