"""From PEFT's folder to ours, without PEFT: names, values, each refusal."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.peft_io.folders import (
  COMMON,
  HEAD,
  KEY,
  LORA,
  MODULE,
  QUERY,
  RANK,
  TARGETS,
  VERA,
  WIDE,
  WIDTHS,
  head,
  matrices,
  noise,
  pair,
  vectors,
  write,
)
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.projections import digest, make_pair
from vera_jax.errors import UserError
from vera_jax.peft_io import import_adapter
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.serve.predictor import Predictor


def test_vera_with_its_projections(carry, tiny_model):
  theirs = vectors() | pair()
  about, tensors = carry(theirs, VERA)
  want = {"classifier.kernel": theirs[HEAD[0]].T}
  want["classifier.bias"] = theirs[HEAD[1]]
  for layer in (0, 1):
    for kind in WIDTHS:
      for leaf in "db":
        name = MODULE.format(layer, kind, f"vera_lambda_{leaf}")
        want[f"encoder.layer.{layer}.{kind}.vera_{leaf}"] = theirs[name]
  assert tensors.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(tensors[name], value)
  assert about["settings"] == {
    "rank": RANK,
    "targets": TARGETS,
    "d_init": 0.1,
    "init": "peft",
    "projection_seed": KEY,
    "sharing": "shared",
    "conv": "whole",
    "train": "both",
  }
  made = make_pair(RANK, 16, 32, seed=KEY, init="peft")
  assert about["projection_digest"] == digest(made)
  assert about["method"] == "vera" and about["base"] == str(tiny_model)
  assert about["labels"] == ["LABEL_0", "LABEL_1"]
  assert about["parameters"]["adapter"] == 2 * (2 * RANK + 16 + 32)
  assert about["parameters"]["head"] == 34


def test_vera_by_its_key(carry):
  about, tensors = carry(vectors(), VERA, save_projection=False)
  assert about["settings"]["init"] == "peft"
  assert about["settings"]["projection_seed"] == KEY
  assert not any("projections" in name for name in tensors)


def test_projections_made_elsewhere_are_kept(carry, tmp_path):
  """Cut to the layers where they are wider."""
  theirs = pair(init="orthogonal", inputs=50, outputs=60)
  about, tensors = carry(vectors() | theirs, VERA)
  assert about["settings"]["init"] == "stored"
  stored = {k: tensors[f"projections.{k}"] for k in "AB"}
  A, B = (theirs[f"base_model.vera_{k}"] for k in "AB")
  np.testing.assert_array_equal(stored["A"], A[:, :16])
  np.testing.assert_array_equal(stored["B"], B[:32])
  assert about["projection_digest"] == digest(stored)
  saved = load_adapter(tmp_path / "ours")
  del saved.tensors["projections.A"]
  with pytest.raises(UserError, match="projections.A"):
    restore_adapter(saved)


@pytest.mark.parametrize("init", ["peft", "orthogonal"])
@pytest.mark.parametrize("scan", [True, False])
def test_what_was_imported_is_restored(carry, tmp_path, init, scan):
  theirs = vectors() | pair(init=init)
  carry(theirs, VERA)
  restored = restore_adapter(load_adapter(tmp_path / "ours"), scan=scan)
  for letter, matrix in restored.projections.items():
    np.testing.assert_array_equal(matrix, theirs[f"base_model.vera_{letter}"])
  query = restored.params["encoder"]["layer" if scan else "layer_0"]
  found = query["attention"]["self"]["query"]["vera_b"]
  np.testing.assert_array_equal(
    found[0] if scan else found,
    theirs[MODULE.format(0, QUERY, "vera_lambda_b")],
  )


def test_layers_left_out_get_nothing_added(carry):
  theirs = vectors(layers=(1,)) | pair()
  about, tensors = carry(theirs, VERA, layers_to_transform=1)
  assert not tensors[f"encoder.layer.0.{WIDE}.vera_b"].any()
  assert (tensors[f"encoder.layer.0.{WIDE}.vera_d"] == np.float32(0.1)).all()
  assert about["parameters"]["adapter"] == 2 * (2 * RANK + 16 + 32)


def test_labels_are_in_the_order_of_their_ids(tiny_model, tmp_path):
  base = shutil.copytree(tiny_model, tmp_path / "base")
  fields = json.loads((base / "config.json").read_text())
  fields["id2label"] = {"1": "yes", "0": "no"}
  (base / "config.json").write_text(json.dumps(fields))
  theirs = write(tmp_path / "theirs", vectors() | pair(), VERA)
  for name, length in (("one", None), ("two", 9)):
    out = tmp_path / name
    import_adapter(theirs, out, base=str(base), max_length=length)
    about = load_adapter(out).about
    assert about["labels"] == ["no", "yes"] and about["max_length"] == length


@pytest.mark.parametrize("rslora, scaling", [(False, "rank"), (True, "root")])
def test_lora(carry, rslora, scaling):
  theirs = matrices()
  about, tensors = carry(theirs, LORA, use_rslora=rslora)
  assert about["method"] == "lora" and about["projection_digest"] is None
  assert about["settings"]["alpha"] == 6
  assert about["settings"]["scaling"] == scaling
  for leaf in ("lora_A", "lora_B"):
    np.testing.assert_array_equal(
      tensors[f"encoder.layer.0.{WIDE}.{leaf}"],
      theirs[MODULE.format(0, WIDE, f"{leaf}.weight")],
    )


D0 = MODULE.format(0, QUERY, "vera_lambda_d")
TENSORS = {
  "no pair": ({"base_model.vera_A": None}, "lacks base_model.vera_A"),
  "half a layer": ({D0: None}, "lacks vera_d"),
  "shape": ({D0: noise(RANK + 1)}, "Is it the right base?"),
  "pair's shape": ({"base_model.vera_A": noise(RANK, 9)}, "vera_A and vera_B"),
  "half a head": ({HEAD[1]: None}, "classifier/bias"),
  "no head": (dict.fromkeys(HEAD), "has a classifier"),
  "adapted head": (
    {f"base_model.model.classifier.vera_lambda_{k}": noise(2) for k in "db"},
    "classifier is part of the head",
  ),
  "magnitude": (
    {MODULE.format(0, QUERY, "lora_magnitude_vector"): noise(16)},
    "lora_magnitude_vector",
  ),
  "bias": ({MODULE.format(0, QUERY, "bias"): noise(16)}, "query.bias"),
  "another model": (
    {"base_model.model.model.layers.0.q_proj.vera_lambda_d": noise(RANK)},
    "q_proj",
  ),
  "no number": ({D0: np.full(RANK, np.nan, np.float32)}, "not finite numbers"),
  "whole numbers": ({D0: np.zeros(RANK, np.int8)}, "stored as I8"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_refused(carry, case):
  changes, words = TENSORS[case]
  tensors = vectors() | pair() | changes
  with pytest.raises(UserError) as error:
    carry({n: x for n, x in tensors.items() if x is not None}, VERA)
  assert words in str(error.value)


def test_files_refused(tiny_model, minilm_folder, tmp_path, monkeypatch):
  def fails(words, folder, out=tmp_path / "out", base=tiny_model, **options):
    with pytest.raises(UserError, match=words):
      import_adapter(folder, out, base=base and str(base), **options)
    assert out == tiny_model or not out.exists()

  theirs = write(tmp_path / "theirs", vectors() | pair(), VERA)
  fails("There is no .*adapter_config.json", tmp_path)
  fails("there already", theirs, out=tiny_model)
  monkeypatch.setenv("HOME", str(tmp_path))
  fails("there already", Path("~/theirs"), out=Path("~/theirs"))
  fails("names no base model", Path("~/theirs"), base=None)
  fails("names no base model", theirs, base=None)
  fails("layer.2.*, or the base is another", theirs, base=minilm_folder)
  fails("max_length is -5", theirs, max_length=-5)
  fails("has 2 outputs, but the labels are ent", theirs, task="mnli")
  file = theirs / "adapter_model.safetensors"
  whole = file.read_bytes()
  for damaged in (whole[:-9], whole[:50], b"", b"\xff" + whole[1:]):
    file.write_bytes(damaged)
    fails("no whole safetensors file", theirs)
  file.rename(file.with_suffix(".bin"))
  fails("pickle format", theirs)
  file.write_bytes(whole)
  (theirs / "adapter_config.json").write_text("{")
  fails("can't be read as JSON", theirs)


THETA = {"base_model.unilora_theta_d": noise(30)}
UNILORA = {
  **COMMON,
  "peft_type": "UNILORA",
  "theta_d_length": 30,
  "proj_seed": 5,
}


def test_one_vector_for_all_layers(carry):
  about, tensors = carry(head() | THETA, UNILORA)
  (theirs,) = THETA.values()
  np.testing.assert_array_equal(tensors["unilora_theta"], theirs)
  assert about["parameters"]["adapter"] == 30
  assert about["settings"]["targets"] == TARGETS


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"theta_d_length": 31}, "its config needs (31,)"),
    ({"r": 20_000_000}, "The random matrices would have"),
    ({"layers_to_transform": [0]}, "leaves out bert.encoder.layer.1"),
    ({"target_modules": None}, "names no target_modules"),
    ({"save_indices": True}, "Set save_indices=False"),
    ({"proj_seed": 2**32}, "projection_seed=4294967296"),
    (
      {"peft_type": "RANDLORA", "sparse": True, "save_projection": False},
      "such bases are not drawn here",
    ),
    ({"peft_type": "PVERA", "sample_at_inference": True}, "sample_at_inf"),
  ],
)
def test_files_of_other_methods_refused(carry, changes, words):
  config = UNILORA | changes
  if config["peft_type"] != "UNILORA":
    del config["theta_d_length"], config["proj_seed"]
  with pytest.raises(UserError) as error:
    carry(head() | THETA, config)
  assert words in str(error.value)


def test_a_module_of_the_base_that_was_trained_whole(tiny_model, tmp_path):
  """It takes the place of the base's, which has one in its file."""
  pooler = {"weight": noise(16, 16), "bias": noise(16)}
  theirs = matrices() | {
    f"base_model.model.bert.pooler.dense.{k}": x for k, x in pooler.items()
  }
  whole = [*COMMON["modules_to_save"], "pooler"]
  base = shutil.copytree(tiny_model, tmp_path / "base")
  weights = load_file(base / "model.safetensors")
  weights |= {f"bert.pooler.dense.{k}": x for k, x in pooler.items()}
  assert weights.keys() == load_file(tiny_model / "model.safetensors").keys()
  save_file(weights, base / "model.safetensors")
  logits = []
  for name, tensors, modules, of in (
    ("one", theirs, whole, tiny_model),
    ("two", matrices(), COMMON["modules_to_save"], base),
    ("plain", matrices(), COMMON["modules_to_save"], tiny_model),
  ):
    folder = tmp_path / name
    folder.mkdir()
    write(folder / "theirs", tensors, LORA, modules_to_save=modules)
    import_adapter(folder / "theirs", folder / "ours", base=str(of))
    restored = restore_adapter(load_adapter(folder / "ours"))
    logits.append(Predictor(restored).logits(["word1 word2", "word3"]))
  np.testing.assert_array_equal(logits[0], logits[1])
  assert np.abs(logits[0] - logits[2]).max() > 0.1
