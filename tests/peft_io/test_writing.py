"""From our folder to PEFT's and back, without PEFT."""

import json
import shutil

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from tests.peft_io.folders import (
  HEAD,
  LORA,
  MODULE,
  RANK,
  TARGETS,
  VERA,
  WIDE,
  WIDTHS,
  matrices,
  pair,
  vectors,
)
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.projections import make_pair
from vera_jax.errors import UserError
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.peft_io.writing import WARNING

SETTINGS = {
  "rank": RANK,
  "targets": TARGETS,
  "lr": 0.02,
  "head_lr": 0.01,
  "projection_seed": 3,
}


@pytest.fixture
def export(random_adapter, tmp_path):
  """A trained VeRA adapter, exported: it, the config, the file, warnings."""

  def export(method=None, **settings):
    ours = random_adapter(**{**SETTINGS, **settings})
    file = ours / "adapter.json"
    about = json.loads(file.read_text()) | {"seed": 1, "score": 0.5}
    file.write_text(json.dumps(about))
    warnings, _ = export_adapter(ours, tmp_path / "theirs", method=method)
    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    theirs = tmp_path / "theirs/adapter_model.safetensors"
    return load_adapter(ours), config, theirs, warnings

  return export


@pytest.mark.parametrize("init", ["kaiming_uniform", "orthogonal", "peft"])
def test_there_and_back(export, tmp_path, init):
  saved, _, _, warnings = export(init=init)
  *warnings, of_base = warnings
  assert warnings == ([] if init == "peft" else [WARNING])
  assert "names the base by a path of this machine" in of_base
  modes = {x.name: x.stat().st_mode for x in (tmp_path / "theirs").iterdir()}
  assert len(modes) == 3 and len({*modes.values()}) == 1, modes
  card = (tmp_path / "theirs/README.md").read_text()
  assert "library_name: peft" in card and "base_model:" not in card
  import_adapter(tmp_path / "theirs", tmp_path / "back")
  back = load_adapter(tmp_path / "back").about
  assert saved.about.items() <= back.items()  # max_length among them
  one, two = (
    (folder / "adapter.safetensors").read_bytes()
    for folder in (saved.folder, tmp_path / "back")
  )
  assert one == two


def test_what_peft_gets(export, tiny_model):
  saved, config, file, _ = export(init="peft")
  assert config == {
    "peft_type": "VERA",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": str(tiny_model),
    "inference_mode": True,
    "target_modules": [WIDE, "query"],
    "modules_to_save": ["classifier"],
    "bias": "none",
    "fan_in_fan_out": False,
    "r": RANK,
    "d_initial": 0.1,
    "projection_prng_key": 3,
    "save_projection": True,
    "vera_dropout": 0.0,
  }
  with safe_open(file, "numpy") as opened:
    header = opened.metadata()
  assert header["format"] == "pt"
  assert json.loads(header["vera_jax"])["base"] == tiny_model.name
  want = pair(3) | {HEAD[0]: saved.tensors["classifier.kernel"].T}
  want[HEAD[1]] = saved.tensors["classifier.bias"]
  for layer in (0, 1):
    for kind in WIDTHS:
      for leaf in "db":
        name = MODULE.format(layer, kind, f"vera_lambda_{leaf}")
        ours = f"encoder.layer.{layer}.{kind}.vera_{leaf}"
        want[name] = saved.tensors[ours]
  tensors = load_file(file)
  assert tensors.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(tensors[name], value)


def test_vera_as_lora(export, tmp_path):
  saved, config, file, warnings = export("lora")
  assert WARNING not in warnings and config["peft_type"] == "LORA"
  assert (config["r"], config["lora_alpha"]) == (RANK, RANK)  # scale 1
  tensors = load_file(file)
  made = make_pair(RANK, 16, 32, seed=3)
  for kind, (inputs, outputs) in WIDTHS.items():
    d, b = (saved.tensors[f"encoder.layer.1.{kind}.vera_{k}"] for k in "db")
    np.testing.assert_array_equal(
      tensors[MODULE.format(1, kind, "lora_A.weight")],
      d[:, None] * made["A"][:, :inputs],
    )
    np.testing.assert_array_equal(
      tensors[MODULE.format(1, kind, "lora_B.weight")],
      b[:, None] * made["B"][:outputs],
    )
  back = import_adapter(tmp_path / "theirs", tmp_path / "back")
  assert back["method"] == "lora" and back["settings"]["alpha"] == RANK
  assert back["labels"] == saved.about["labels"] and back["task"] == "rte"


@pytest.mark.parametrize("rank, written", [(20, 16), (16, 16), (10, 10)])
def test_lora_needs_no_rank_beyond_the_widths(export, rank, written):
  saved, config, file, _ = export("lora", rank=rank)
  assert (config["r"], config["lora_alpha"]) == (written, written)
  tensors, made = load_file(file), make_pair(rank, 16, 32, seed=3)
  for kind, (inputs, outputs) in WIDTHS.items():
    d, b = (saved.tensors[f"encoder.layer.1.{kind}.vera_{k}"] for k in "db")
    A, B = (tensors[MODULE.format(1, kind, f"lora_{k}.weight")] for k in "AB")
    assert (A.shape, B.shape) == ((written, inputs), (outputs, written))
    delta = (b[:, None] * made["B"][:outputs]) @ (
      d[:, None] * made["A"][:, :inputs]
    )
    scale = np.abs(delta).max()
    np.testing.assert_allclose(B @ A, delta, rtol=0, atol=2e-6 * scale)


def test_a_structured_pair_goes_as_lora_alone(export, tmp_path):
  """By applying it to an identity: the factors are VeRA's, exactly."""
  with pytest.raises(UserError, match="pair is structured: .* --as=lora"):
    export(init="structured")
  saved, config, file, _ = export("lora", init="structured")
  assert config["r"] == RANK
  tensors = load_file(file)
  for kind, (inputs, outputs) in WIDTHS.items():
    made = make_pair(RANK, inputs, outputs, seed=3, init="structured")
    d, b = (saved.tensors[f"encoder.layer.1.{kind}.vera_{k}"] for k in "db")
    for leaf, want in (
      ("lora_A", d[:, None] * np.asarray(made["A"])),
      ("lora_B", b[:, None] * np.asarray(made["B"])),
    ):
      found = tensors[MODULE.format(1, kind, f"{leaf}.weight")]
      np.testing.assert_array_equal(found, want)


def test_exports_refused(random_adapter, tmp_path):
  ours = random_adapter(**SETTINGS)
  file = ours / "adapter.json"
  about = json.loads(file.read_text())

  def fails(words, changes, **options):
    file.write_text(json.dumps(about | changes))
    with pytest.raises(UserError, match=words):
      export_adapter(ours, tmp_path / "theirs", **options)
    assert not (tmp_path / "theirs").exists()

  given = about["settings"]
  fails("method 'bitfit'", {"method": "bitfit"})
  fails("method 'vera.bitfit'; only vera, lora", {"method": "vera+bitfit"})
  fails("dvora adapter .* as PEFT's vera", {"method": "dvora"}, method="vera")
  fails("digest", {"projection_digest": "0"})
  fails("digest", {"projection_digest": "0"}, method="lora")
  fails("another fingerprint", {"base_fingerprint": "0"})
  fails("no usable rank=None", {"settings": {"sharing": "shared"}})
  fails(r"vera_d': \(4,\).* need .*\(5,\)", {"settings": given | {"rank": 5}})
  fails("need {'vera_d'", {"settings": given | {"train": "d"}})
  lora = {"rank": RANK, "alpha": 1.0, "scaling": "rank", "targets": ["query"]}
  fails("need {'lora_A'", {"method": "lora", "settings": lora})
  fails("There is no folder", {"base": "/nowhere"})
  unique = random_adapter(**SETTINGS, sharing="unique")
  with pytest.raises(UserError, match="--as=lora"):
    export_adapter(unique, tmp_path / "theirs")


def test_lora_is_no_vera(carry, tmp_path):
  carry(matrices(), LORA)
  with pytest.raises(UserError, match="can't be written as PEFT's vera"):
    export_adapter(tmp_path / "ours", tmp_path / "vera", method="vera")


def test_a_full_disk_leaves_no_part_of_an_export(carry, tmp_path, monkeypatch):
  carry(vectors() | pair(), VERA)

  def full(file, *args, **fields):
    file.write_bytes(b"a part")
    raise SafetensorError("I/O error: No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("vera_jax.peft_io.writing.write_tensors", full)
    with pytest.raises(UserError, match="out can't be written: .* No space"):
      export_adapter(tmp_path / "ours", tmp_path / "out")
  assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()
  export_adapter(tmp_path / "ours", tmp_path / "out")


def flip_last_bit(file):
  data = file.read_bytes()
  file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_damage_goes_no_further(carry, tmp_path, method):
  carry(vectors() | pair(), VERA)
  export_adapter(tmp_path / "ours", tmp_path / "out", method=method)
  import_adapter(tmp_path / "out", tmp_path / "whole")
  flip_last_bit(tmp_path / "out/adapter_model.safetensors")
  with pytest.raises(UserError, match="is damaged: its tensors differ"):
    import_adapter(tmp_path / "out", tmp_path / "back")
  flip_last_bit(tmp_path / "ours/adapter.safetensors")
  with pytest.raises(UserError, match="checksum differs"):
    export_adapter(tmp_path / "ours", tmp_path / "back")
  assert not (tmp_path / "back").exists()


def test_an_export_keeps_to_its_base(carry, tiny_model, tmp_path):
  """PEFT's own files name no weights; what we export does."""
  carry(vectors() | pair(), VERA)
  export_adapter(tmp_path / "ours", tmp_path / "out")
  other = shutil.copytree(tiny_model, tmp_path / "other")
  stored = load_file(other / "model.safetensors")
  stored["bert.pooler.dense.bias"][0] += 1e-3
  save_file(stored, other / "model.safetensors")
  for move, folder in ((export_adapter, "ours"), (import_adapter, "out")):
    with pytest.raises(UserError, match="another fingerprint"):
      move(tmp_path / folder, tmp_path / "new", base=str(other))
  assert not (tmp_path / "new").exists()
