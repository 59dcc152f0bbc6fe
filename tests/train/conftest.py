"""A tiny model for steps; one whole run, and what runs are compared by."""

import json
import os
import shutil
import signal
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from tests.conftest import TINY
from tests.random_adapter import SETTINGS
from tests.untimed import untimed_metrics, without_times
from vera_jax.adapters.labels import count, split
from vera_jax.pretrained.blueprint import Blueprint, Model, blueprint
from vera_jax.progress import ProgressBar
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.preemption import Interrupted
from vera_jax.train.step import outputs_of


def tiny_blueprint(method, *, dropout=0.0, plan="auto", **fields) -> Blueprint:
  """Three labels on a BERT of three layers, whose heads two devices divide."""
  rates = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout
  )
  sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 24}
  return blueprint(
    {**TINY, **sizes, **rates, **fields},
    outputs=3,
    method=method,
    settings=SETTINGS.get(method, {}),
    plan=plan,
  )


@cache
def random_model(method, **options) -> Model:
  """A model of random numbers, the same for equal shapes, on one device."""
  plan = tiny_blueprint(method, **options)
  key = jax.random.key(0)
  shapes = jax.eval_shape(plan.module.init, key, **plan.inputs)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(
      0.3 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale"),
      leaf.dtype,
    ),
    shapes,
  )
  labels = plan.label(params)
  trainable, frozen = split(params, labels)
  return Model(
    blueprint=plan,
    labels=split(labels, labels)[0],
    counts=count(params, labels),
    trainable=here(trainable),
    frozen=here(frozen),
    projections=here(plan.projections(params)),
  )


def here(tree):
  """On one device for good: a jitted function has one program for all such."""
  return jax.device_put(tree, jax.devices()[0])


def outputs(model: Model):
  """(params, frozen, batch, key) -> (logits, penalty)."""
  plan = model.blueprint
  return partial(outputs_of, plan.module, tuple(plan.inputs))


class Finished(NamedTuple):
  config: ConfigDict
  folder: Path
  result: dict


@pytest.fixture(scope="session")
def finished(tiny_config, tmp_path_factory) -> Finished:
  """VeRA, three epochs of ten steps, left alone. Look, don't touch."""
  config, folder = tiny_config(), tmp_path_factory.mktemp("finished") / "run"
  return Finished(config, folder, train_and_evaluate(config, folder))


@pytest.fixture(scope="session")
def quiet_model(tiny_model, tmp_path_factory) -> Path:
  """The tiny model without dropout, whose masks depend on the mesh."""
  folder = tmp_path_factory.mktemp("quiet") / "model"
  shutil.copytree(tiny_model, folder)
  fields = json.loads((folder / "config.json").read_text())
  off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
  (folder / "config.json").write_text(json.dumps({**fields, **off}))
  return folder


@pytest.fixture
def stop_at(monkeypatch):
  """Sends this process a signal once a step's metrics are in."""

  def arm(step, number=signal.SIGTERM):
    advance = ProgressBar.advance

    def hooked(self, at, *, loss):
      advance(self, at, loss=loss)
      if at == step:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressBar, "advance", hooked)

  yield arm
  monkeypatch.undo()


@pytest.fixture(scope="session")
def stopped(finished, tmp_path_factory):
  """A run that SIGTERM stopped in its third epoch. Copy, don't touch."""
  folder = tmp_path_factory.mktemp("stopped") / "run"
  advance = ProgressBar.advance

  def hooked(self, at, *, loss):
    advance(self, at, loss=loss)
    if at == 24:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ProgressBar, "advance", hooked)
    with pytest.raises(Interrupted):
      train_and_evaluate(finished.config, folder)
  return folder


def _saved(folder: Path, step: int):
  path = folder / "checkpoints" / str(step)
  leaves = ocp.StandardCheckpointer().restore(path / "state")
  progress = json.loads((path / "progress" / "metadata").read_text())
  named = jax.tree_util.tree_leaves_with_path(leaves)
  return {
    jax.tree_util.keystr(p): np.asarray(x) for p, x in named
  }, without_times(progress)


@pytest.fixture(scope="session")
def saved():
  """(arrays by name, progress without seconds) of a save."""
  return _saved


@pytest.fixture(scope="session")
def assert_same_run():
  """Everything but the seconds is equal to the last bit.

  `scored` is false where a signal stopped the evaluation of that step: its save
  is of before, and stays so.
  """

  def check(one: Path, two: Path, step: int, *, scored: bool = True) -> None:
    (arrays, progress), (others, other) = _saved(one, step), _saved(two, step)
    if not scored:
      last = other["history"].pop()
      count = step - sum(epoch["step"] for epoch in other["history"][-1:])
      other["loss_sum"] = pytest.approx(last["train_loss"] * count)
    assert progress == other
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
      assert array.tobytes() == others[name].tobytes(), name
    assert untimed_metrics(one) == untimed_metrics(two)
    name = "adapter/adapter.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    results = [
      json.loads((folder / "result.json").read_text()) for folder in (one, two)
    ]
    assert without_times(results[0]) == without_times(results[1])

  return check
