"""One whole run that many tests look at, and what they compare runs by."""

import json
import os
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from vera_jax.train.logging import ProgressBar
from vera_jax.train.loop import train_and_evaluate


class Finished(NamedTuple):
  config: ConfigDict
  folder: Path
  result: dict


@pytest.fixture(scope="session")
def finished(tiny_config, tmp_path_factory) -> Finished:
  """VeRA, three epochs of ten steps, left alone. Look, don't touch."""
  config, folder = tiny_config(), tmp_path_factory.mktemp("finished") / "run"
  return Finished(config, folder, train_and_evaluate(config, folder))


@pytest.fixture
def stop_at(monkeypatch):
  """Sends this process a signal once a step's figures are in."""

  def arm(step, number=signal.SIGTERM):
    advance = ProgressBar.advance

    def hooked(self, at, *, loss):
      advance(self, at, loss=loss)
      if at == step:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressBar, "advance", hooked)

  yield arm
  monkeypatch.undo()


def _saved(folder: Path, step: int):
  path = folder / "checkpoints" / str(step)
  leaves = ocp.StandardCheckpointer().restore(path / "state")
  progress = json.loads((path / "progress" / "metadata").read_text())
  del progress["seconds"]
  named = jax.tree_util.tree_leaves_with_path(leaves)
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in named}, progress


@pytest.fixture(scope="session")
def saved():
  """(arrays by name, progress without seconds) of a save."""
  return _saved


@pytest.fixture(scope="session")
def assert_same_run():
  """Everything but the seconds is equal to the last bit."""

  def check(one: Path, two: Path, step: int) -> None:
    (arrays, progress), (others, other) = _saved(one, step), _saved(two, step)
    assert progress == other
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
      assert array.tobytes() == others[name].tobytes(), name
    for name in ("metrics.jsonl", "adapter/adapter.safetensors"):
      assert (one / name).read_bytes() == (two / name).read_bytes()
    results = [
      json.loads((folder / "result.json").read_text()) for folder in (one, two)
    ]
    for result in results:
      del result["seconds"]
    assert results[0] == results[1]

  return check
