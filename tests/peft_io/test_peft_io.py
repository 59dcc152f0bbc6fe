"""PEFT's folders, without PEFT: formats, names, shapes, each refusal."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vera_jax.adapters.files import FORMAT, load_adapter, stack_layers
from vera_jax.adapters.projections import digest, make_pair
from vera_jax.errors import UserError
from vera_jax.models.pretrained import blueprint, restore_adapter
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.peft_io.base import linear_layers, module_list, target_patterns
from vera_jax.peft_io.settings import PeftSettings, is_target
from vera_jax.peft_io.writing import WARNING

MODULE = "base_model.model.bert.encoder.layer.{}.{}.{}"
QUERY, WIDE = "attention.self.query", "intermediate.dense"
WIDTHS = {QUERY: (16, 16), WIDE: (16, 32)}  # in, out of the tiny model
RANK, KEY = 4, 7
VERA = {
  "peft_type": "VERA",
  "task_type": "SEQ_CLS",
  "r": RANK,
  "target_modules": ["query", WIDE],
  "modules_to_save": ["classifier", "score"],
  "projection_prng_key": KEY,
  "save_projection": True,
  "d_initial": 0.1,
  "bias": "none",
  "peft_version": "0.21.2",
}
LORA = {
  "peft_type": "LORA",
  "task_type": "SEQ_CLS",
  "r": RANK,
  "lora_alpha": 6,
  "target_modules": ["query", WIDE],
  "modules_to_save": ["classifier", "score"],
  "megatron_core": "megatron.core",
  "qalora_group_size": 16,
  "rank_pattern": {},
  "alpha_pattern": {},
  "loftq_config": {},
}


def noise(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return rng.standard_normal(shape).astype(np.float32)


def vectors(layers=(0, 1), kinds=(QUERY, WIDE)):
  tensors = {
    "base_model.model.classifier.weight": noise(2, 16),
    "base_model.model.classifier.bias": noise(2),
  }
  for layer in layers:
    for kind in kinds:
      name = MODULE.format(layer, kind, "vera_lambda_")
      tensors[f"{name}d"] = noise(RANK, seed=layer)
      tensors[f"{name}b"] = noise(WIDTHS[kind][1], seed=layer)
  return tensors


def pair(seed=KEY, init="peft"):
  made = make_pair(RANK, 16, 32, seed=seed, init=init)
  return {f"base_model.vera_{k}": np.asarray(made[k]) for k in "AB"}


def matrices():
  tensors = vectors(kinds=())
  for layer in (0, 1):
    for kind, (inputs, outputs) in WIDTHS.items():
      name = MODULE.format(layer, kind, "lora_")
      tensors[f"{name}A.weight"] = noise(RANK, inputs, seed=layer)
      tensors[f"{name}B.weight"] = noise(outputs, RANK, seed=layer)
  return tensors


def write(folder, tensors, config, **changes):
  folder.mkdir()
  save_file(tensors, folder / "adapter_model.safetensors")
  (folder / "adapter_config.json").write_text(json.dumps(config | changes))
  return folder


@pytest.fixture
def carry(tiny_model, tmp_path):
  """Writes a PEFT folder, imports it: adapter.json and the tensors."""

  def carry(tensors, config, **changes):
    folder = write(tmp_path / "theirs", tensors, config, **changes)
    import_adapter(folder, tmp_path / "ours", base=str(tiny_model))
    about = json.loads((tmp_path / "ours/adapter.json").read_text())
    return about, load_adapter(tmp_path / "ours").tensors

  return carry


def test_vera_with_its_projections(carry, tiny_model):
  theirs = vectors() | pair()
  about, tensors = carry(theirs, VERA)
  assert {name: x.shape for name, x in tensors.items()} == {
    **{
      f"encoder.layer.{layer}.{kind}.vera_{leaf}": shape
      for layer in (0, 1)
      for kind, (_, outputs) in WIDTHS.items()
      for leaf, shape in (("d", (RANK,)), ("b", (outputs,)))
    },
    "classifier.kernel": (16, 2),
    "classifier.bias": (2,),
  }
  for name in ("d", "b"):
    np.testing.assert_array_equal(
      tensors[f"encoder.layer.1.{WIDE}.vera_{name}"],
      theirs[MODULE.format(1, WIDE, f"vera_lambda_{name}")],
    )
  np.testing.assert_array_equal(
    tensors["classifier.kernel"], theirs["base_model.model.classifier.weight"].T
  )
  assert about["settings"] == {
    "rank": RANK,
    "targets": ["query", "intermediate/dense"],
    "lr": None,
    "head_lr": None,
    "d_init": 0.1,
    "init": "peft",
    "projection_seed": KEY,
    "sharing": "shared",
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


def test_projections_made_elsewhere_are_kept(carry):
  theirs = vectors() | pair(init="orthogonal")
  about, tensors = carry(theirs, VERA)
  assert about["settings"]["init"] == "stored"
  stored = {k: tensors[f"projections.{k}"] for k in "AB"}
  for letter, matrix in stored.items():
    np.testing.assert_array_equal(matrix, theirs[f"base_model.vera_{letter}"])
  assert about["projection_digest"] == digest(stored)


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


def test_stored_projections_that_are_gone(carry, tmp_path):
  carry(vectors() | pair(init="orthogonal"), VERA)
  saved = load_adapter(tmp_path / "ours")
  del saved.tensors["projections.A"]
  with pytest.raises(UserError, match="projections.A"):
    restore_adapter(saved)


def test_wider_projections_are_cut_to_the_layers(carry):
  wide = make_pair(RANK, 50, 60, seed=1)
  theirs = {f"base_model.vera_{k}": np.asarray(wide[k]) for k in "AB"}
  _, tensors = carry(vectors() | theirs, VERA)
  np.testing.assert_array_equal(tensors["projections.A"], wide["A"][:, :16])
  np.testing.assert_array_equal(tensors["projections.B"], wide["B"][:32])


def test_layers_left_out_get_nothing_added(carry):
  theirs = vectors(layers=(1,)) | pair()
  about, tensors = carry(theirs, VERA, layers_to_transform=1)
  assert not tensors[f"encoder.layer.0.{WIDE}.vera_b"].any()
  assert (tensors[f"encoder.layer.0.{WIDE}.vera_d"] == np.float32(0.1)).all()
  assert about["parameters"]["adapter"] == 2 * (2 * RANK + 16 + 32)


@pytest.mark.parametrize("rslora, alpha", [(False, 6.0), (True, 12.0)])
def test_lora(carry, rslora, alpha):
  theirs = matrices()
  about, tensors = carry(theirs, LORA, use_rslora=rslora)
  assert about["method"] == "lora" and about["projection_digest"] is None
  assert about["settings"]["alpha"] == alpha  # the scale is alpha / rank
  for leaf in ("lora_A", "lora_B"):
    np.testing.assert_array_equal(
      tensors[f"encoder.layer.0.{WIDE}.{leaf}"],
      theirs[MODULE.format(0, WIDE, f"{leaf}.weight")],
    )


REFUSED = {
  "bias": ({"bias": "all"}, "bias='all'"),
  "fan_in_fan_out": ({"fan_in_fan_out": True}, "set it to false"),
  "method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
  "task": ({"task_type": "CAUSAL_LM"}, "task_type='CAUSAL_LM'"),
  "unknown field": ({"new_trick": 3}, "new_trick=3"),
  "rank": ({"r": "four"}, "r='four'"),
  "other rank": ({"r": 5}, "r = 5 need"),
  "layers": ({"layers_to_transform": [0]}, "leaves out bert.encoder.layer.1"),
  "targets": ({"target_modules": ["key", "query", WIDE]}, "self.key"),
  "expression": ({"target_modules": "*query"}, "regular expression"),
  "type": ({"target_modules": 3}, "unusable value"),
}
REFUSED_LORA = {
  "dora": ({"use_dora": True}, "use_dora=True: DoRA"),
  "bias": ({"lora_bias": True}, "lora_bias=True"),
  "ranks": ({"rank_pattern": {"query": 8}}, "rank_pattern"),
  "alphas": ({"alpha_pattern": {"query": 8}}, "alpha_pattern"),
  "pissa": ({"init_lora_weights": "pissa"}, "changed the base's weights"),
  "loftq": ({"loftq_config": {"loftq_bits": 4}}, "quantised"),
  "qalora": ({"use_qalora": True}, "quantised"),
  "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
  "replicated": ({"layer_replication": [[0, 1]]}, "layer_replication"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(carry, case):
  changes, told = REFUSED[case]
  with pytest.raises(UserError) as error:
    carry(vectors() | pair(), VERA, **changes)
  assert told in str(error.value)


@pytest.mark.parametrize("case", REFUSED_LORA)
def test_lora_refused(carry, case):
  changes, told = REFUSED_LORA[case]
  with pytest.raises(UserError) as error:
    carry(matrices(), LORA, **changes)
  assert told in str(error.value)


def test_patterns_that_change_nothing_are_fine(carry):
  same = {"rank_pattern": {"query": RANK}, "alpha_pattern": {"query": 6}}
  assert carry(matrices(), LORA, **same)[0]["settings"]["rank"] == RANK


D0 = MODULE.format(0, QUERY, "vera_lambda_d")
TENSORS = {
  "no pair": ({"base_model.vera_A": None}, "lacks base_model.vera_A"),
  "half a layer": ({D0: None}, "lacks vera_d"),
  "shape": ({D0: noise(RANK + 1)}, "Is it the right base?"),
  "pair's shape": ({"base_model.vera_A": noise(RANK, 9)}, "vera_A and vera_B"),
  "half a head": (
    {"base_model.model.classifier.bias": None},
    "classifier/bias",
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
  changes, told = TENSORS[case]
  tensors = vectors() | pair() | changes
  with pytest.raises(UserError) as error:
    carry({n: x for n, x in tensors.items() if x is not None}, VERA)
  assert told in str(error.value)


def test_no_head_anywhere(carry):
  tensors = {n: x for n, x in vectors().items() if "classifier" not in n}
  with pytest.raises(UserError, match="has a classifier"):
    carry(tensors | pair(), VERA)


def test_files_refused(tiny_model, tmp_path):
  def fails(told, folder, out=tmp_path / "out", base=str(tiny_model)):
    with pytest.raises(UserError, match=told):
      import_adapter(folder, out, base=base)
    assert out == tiny_model or not out.exists()

  theirs = write(tmp_path / "theirs", vectors() | pair(), VERA)
  fails("There is no .*adapter_config.json", tmp_path)
  fails("there already", theirs, out=tiny_model)
  fails("names no base model", theirs, base=None)
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


def trained(folder, base, **settings):
  """A VeRA adapter of ours, as a run writes it."""
  given = {
    "rank": RANK,
    "targets": ["query", "intermediate/dense"],
    "lr": 0.02,
    "head_lr": 0.01,
    "d_init": 0.1,
    "init": "kaiming_uniform",
    "projection_seed": 3,
    "sharing": "shared",
    "train": "both",
    **settings,
  }
  theirs = write(
    folder.with_name("made"),
    vectors() | pair(given["projection_seed"], given["init"]),
    VERA,
  )
  about = import_adapter(theirs, folder, base=str(base), task="sst2")
  about |= {"settings": given, "seed": 1, "score": 0.5}
  tensors = load_adapter(folder).tensors
  own = {n: x for n, x in tensors.items() if "projections" not in n}
  save_file(stack_layers(own), folder / "adapter.safetensors")
  (folder / "adapter.json").write_text(json.dumps(about))
  return about, own


@pytest.mark.parametrize("init", ["kaiming_uniform", "orthogonal", "peft"])
def test_there_and_back(tiny_model, tmp_path, init):
  about, own = trained(tmp_path / "ours", tiny_model, init=init)
  warnings = export_adapter(tmp_path / "ours", tmp_path / "theirs")
  assert warnings == ([] if init == "peft" else [WARNING])
  back = import_adapter(tmp_path / "theirs", tmp_path / "back")
  assert back == about
  one, two = (
    (tmp_path / name / "adapter.safetensors").read_bytes()
    for name in ("ours", "back")
  )
  assert one == two
  written = json.loads((tmp_path / "back/adapter.json").read_text())
  assert len(written.pop("tensors_sha256")) == 64
  assert written.pop("format") == FORMAT
  assert written == about


def test_what_peft_gets(tiny_model, tmp_path):
  _, own = trained(tmp_path / "ours", tiny_model, init="peft")
  export_adapter(tmp_path / "ours", tmp_path / "theirs")
  config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
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
  file = tmp_path / "theirs/adapter_model.safetensors"
  with safe_open(file, "numpy") as opened:
    assert opened.metadata()["format"] == "pt"
  want = vectors() | pair(3)
  tensors = load_file(file)
  assert set(tensors) == set(want)
  for name, value in want.items():
    np.testing.assert_array_equal(tensors[name], value)


def test_vera_as_lora(tiny_model, tmp_path):
  about, own = trained(tmp_path / "ours", tiny_model)
  assert not export_adapter(
    tmp_path / "ours", tmp_path / "theirs", method="lora"
  )
  config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
  assert config["peft_type"] == "LORA"
  assert (config["r"], config["lora_alpha"]) == (RANK, RANK)  # scale 1
  tensors = load_file(tmp_path / "theirs/adapter_model.safetensors")
  made = make_pair(RANK, 16, 32, seed=3)
  for kind, (inputs, outputs) in WIDTHS.items():
    d, b = (own[f"encoder.layer.1.{kind}.vera_{k}"] for k in "db")
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
  assert back["labels"] == about["labels"] and back["task"] == "sst2"


def test_exports_refused(tiny_model, tmp_path):
  about, _ = trained(tmp_path / "ours", tiny_model)
  file = tmp_path / "ours/adapter.json"

  def fails(told, changes, **kwargs):
    file.write_text(json.dumps(about | changes))
    with pytest.raises(UserError, match=told):
      export_adapter(tmp_path / "ours", tmp_path / "theirs", **kwargs)
    assert not (tmp_path / "theirs").exists()

  given = about["settings"]
  unique = {**given, "sharing": "unique"}
  fails("method 'bitfit'", {"method": "bitfit"})
  fails("--as=lora", {"settings": unique})
  fails("digest", {"projection_digest": "0"})
  fails("digest", {"projection_digest": "0"}, method="lora")
  fails("another fingerprint", {"base_fingerprint": "0"})
  fails("no usable rank=None", {"settings": {"sharing": "shared"}})
  fails(r"vera_d': \(4,\).* need .*\(5,\)", {"settings": given | {"rank": 5}})
  fails("need {'vera_d'", {"settings": given | {"train": "d"}})
  lora = {"rank": RANK, "alpha": 1.0, "targets": ["query"]}
  fails("need {'lora_A'", {"method": "lora", "settings": lora})
  fails("There is no folder", {"base": "/nowhere"})


def test_lora_is_no_vera(carry, tmp_path):
  carry(matrices(), LORA)
  with pytest.raises(UserError, match="can't be written as VeRA"):
    export_adapter(tmp_path / "ours", tmp_path / "vera", method="vera")


def flipped(file):
  """One bit of the last number."""
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)


def test_a_damaged_adapter_is_not_exported(carry, tmp_path):
  carry(vectors() | pair(), VERA)
  flipped(tmp_path / "ours/adapter.safetensors")
  with pytest.raises(UserError, match="checksum differs"):
    export_adapter(tmp_path / "ours", tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_a_damaged_export_is_not_imported(carry, tmp_path, method):
  carry(vectors() | pair(), VERA)
  export_adapter(tmp_path / "ours", tmp_path / "out", method=method)
  import_adapter(tmp_path / "out", tmp_path / "whole")
  flipped(tmp_path / "out/adapter_model.safetensors")
  with pytest.raises(UserError, match="is damaged: its tensors differ"):
    import_adapter(tmp_path / "out", tmp_path / "back")
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


def test_a_base_with_more_layers(minilm_folder, tmp_path):
  theirs = write(tmp_path / "theirs", vectors() | pair(), VERA)
  with pytest.raises(UserError, match="layer.2.*, or the base is another"):
    import_adapter(theirs, tmp_path / "ours", base=str(minilm_folder))
  assert not (tmp_path / "ours").exists()


@pytest.fixture(scope="module")
def layers():
  sizes = dict.fromkeys(
    ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 2
  )
  sizes |= {"intermediate_size": 4, "max_position_embeddings": 8}
  fields = {"model_type": "bert", "pad_token_id": 0, **sizes}
  return linear_layers(blueprint(fields, outputs=2, scan=False))


def adapted(layers, /, **settings):
  empty = {"exclude": (), "layers_pattern": (), "modules_to_save": ()}
  about = {"method": "lora", "rank": RANK, "base": None, "layers": None}
  known = PeftSettings(**about | empty | settings)
  return {name for name in layers if is_target(known, name)}


def test_targets_as_peft_finds_them(layers):
  layer = "bert.encoder.layer.{}.{}"
  outer = {layer.format(i, "output.dense") for i in (0, 1)}
  inner = {layer.format(i, "attention.output.dense") for i in (0, 1)}
  assert adapted(layers, targets=("output.dense",)) == outer | inner
  out = ("attention.output.dense",)
  assert adapted(layers, targets=("output.dense",), exclude=out) == outer
  regex = r".*layer\.1\.output\.dense"
  assert adapted(layers, targets=regex) == {layer.format(1, "output.dense")}
  assert adapted(layers, targets=("query",), layers=(1,)) == {
    layer.format(1, QUERY)
  }
  other = {"layers": (1,), "layers_pattern": ("blocks",)}
  assert not adapted(layers, targets=("query",), **other)
  whole = layer.format(0, QUERY)  # a whole name is taken whatever the layers
  assert adapted(layers, targets=(whole,), layers=(1,)) == {whole}
  kept = {"modules_to_save": ("classifier",)}
  assert adapted(layers, targets=("classifier",), **kept) == set()


def test_the_shortest_names_for_layers(layers):
  kinds = {layer.kind for name, layer in layers.items() if "dense" in name}
  assert target_patterns(kinds, layers) == [
    "attention/output/dense",
    "intermediate/dense",
    r"layer(_\d+)?/output/dense",
    "pooler/dense",
  ]
  outer = [name for name in layers if name.endswith("r.0.output.dense")]
  outer += [name for name in layers if name.endswith("r.1.output.dense")]
  inner = [name for name in layers if "attention.output" in name]
  assert module_list(outer, layers) == outer
  assert module_list(inner, layers) == ["attention.output.dense"]
  assert module_list(inner[:1], layers) == inner[:1]
