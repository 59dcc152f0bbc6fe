"""Runs on a base in codes: on a mesh, put to use."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.faults.fixtures import random_encoder
from tests.train.conftest import Finished
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.export.hf import write_merged
from vera_jax.operations.quantised import is_quantised
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.predictor import Predictor
from vera_jax.train.loop import train_and_evaluate

pytestmark = pytest.mark.slow

TEXTS = ["the film is a film"], ["the film"]


@pytest.fixture(scope="module")
def wide(quiet_model, tmp_path_factory) -> Path:
  """The tiny model with kernels that hold blocks of nf4, as large by column."""
  folder = tmp_path_factory.mktemp("wide") / "model"
  shutil.copytree(quiet_model, folder)
  sizes = {"hidden_size": 64, "intermediate_size": 64}
  fields = json.loads((folder / "config.json").read_text()) | sizes
  (folder / "config.json").write_text(json.dumps(fields))
  tensors = {
    name: tensor / 2 if tensor.ndim == 2 else tensor
    for name, tensor in random_encoder(fields).items()
  }
  save_file(tensors, folder / "model.safetensors")
  return folder


@pytest.fixture(scope="module")
def nf4(tiny_config, wide, tmp_path_factory) -> Finished:
  """One epoch of ten steps, left alone."""
  config = tiny_config(
    method="dvora",
    model__quantise="nf4",
    model__name=str(wide),
    optim__epochs=1,
  )
  folder = tmp_path_factory.mktemp("nf4") / "run"
  return Finished(config, folder, train_and_evaluate(config, folder))


def test_a_run_on_a_mesh_is_the_run_on_one_device(nf4, tmp_path):
  """Codes and scales are split as the kernels are."""
  config = nf4.config.copy_and_resolve_references()
  config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
  train_and_evaluate(config, tmp_path)
  one, alone = (
    load_file(folder / "adapter/adapter.safetensors")
    for folder in (tmp_path, nf4.folder)
  )
  for name, leaf in alone.items():
    np.testing.assert_allclose(one[name], leaf, rtol=0, atol=1e-5)


def test_an_adapter_belongs_to_the_codes_it_was_trained_on(nf4, tmp_path):
  """They are made again; predicting, merging and a bank use their weights."""
  saved = load_adapter(nf4.folder / "adapter")
  assert saved.about["quantise"] == "nf4"
  assert len(saved.about["codes_digest"]) == 64
  plainly, coded = (restore_adapter(saved, codes=x) for x in (False, True))
  kernel = coded.params["encoder"]["layer"]["output"]["dense"]["kernel"]
  assert is_quantised(kernel) and kernel.codes.dtype == np.uint8
  other = saved._replace(about={**saved.about, "quantise": "none"})
  del other.about["codes_digest"]
  unquantised = restore_adapter(other)
  answers, again, far = (
    Predictor(x).logits(*TEXTS) for x in (plainly, coded, unquantised)
  )
  np.testing.assert_allclose(answers, again, atol=1e-5)
  assert np.abs(answers - far).max() > 1e-4
  about = write_merged(coded, tmp_path / "merged")  # compares the logits
  assert about["quantise"] == "nf4"
  bank = AdapterBank({"a": saved})
  found = bank.logits(*TEXTS, adapters="a")
  np.testing.assert_allclose(found, answers, atol=1e-5)
  with pytest.raises(UserError, match="base .quantised.: none there, nf4 in"):
    bank.replace("a", other)
  for change in ({"codes_digest": "0" * 64}, {"quantise": "none"}):
    wrong = saved._replace(about={**saved.about, **change})
    with pytest.raises(UserError, match="codes of the base come out different"):
      restore_adapter(wrong)
