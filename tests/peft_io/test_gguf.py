"""Adapters as llama.cpp's files, there and back, and cut to a lower rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.experiments.command import run_each
from tests.models.gguf_folders import ROWS, random_folder
from tests.random_adapter import write_adapter
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.models.decoder import logits
from vera_jax.models.gguf_file import Written, read_gguf, write_gguf
from vera_jax.peft_io import export_adapter
from vera_jax.peft_io.forms.lora import truncated
from vera_jax.peft_io.gguf import export_gguf_adapter, import_gguf_adapter
from vera_jax.peft_io.settings import FILE as SETTINGS
from vera_jax.peft_io.tensors import FILE, read_tensors
from vera_jax.pretrained.classifier import load_classifier, restore_adapter

IDS = np.random.default_rng(1).integers(0, ROWS, (2, 9)).astype(np.int32)
KIND = "language_modelling"
LLAMA = ["q_proj", "k_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bases")
  return {
    kind: random_folder(folder / kind, kind) for kind in ("llama", "gpt2")
  }


@pytest.fixture
def vera(bases, tmp_path):
  """A VeRA adapter of a rank beyond all widths, on a Llama."""
  write_adapter(
    tmp_path / "vera", base=bases["llama"], kind=KIND, rank=100, targets=LLAMA
  )
  return tmp_path / "vera"


def our_logits(model):
  words = jax.jit(model.module.apply)(model.variables, jnp.asarray(IDS))
  return np.asarray(logits(words))


@pytest.mark.parametrize(
  "kind, method, settings, rank",
  [
    ("llama", "vera", {"rank": 100, "targets": LLAMA}, 64),
    ("llama", "lora_fa", {"targets": LLAMA}, 2),  # whose scale is alpha / √r
    ("gpt2", "vera", {"rank": 8}, 16),  # query and value of one fused layer
  ],
)
def test_an_adapter_is_the_same_in_a_file(
  kind, method, settings, rank, bases, tmp_path
):
  base, file = bases[kind], tmp_path / "a.gguf"
  write_adapter(tmp_path / "a", method, base=base, kind=KIND, **settings)
  about = export_gguf_adapter(tmp_path / "a", file)
  assert about["rank"] == rank and about["lost"] == 0
  gguf = read_gguf(file)
  assert gguf.metadata["general.architecture"] == kind
  assert gguf.metadata["general.type"] == "adapter"
  if kind == "llama" and rank > 2:  # no more rows than the key's 32 outputs
    assert gguf.tensors["blk.0.attn_k.weight.lora_a"].shape == (32, 64)
  import_gguf_adapter(file, tmp_path / "back", base=str(base))
  before, after = (
    our_logits(restore_adapter(load_adapter(tmp_path / x)))
    for x in ("a", "back")
  )
  assert np.abs(before - our_logits(load_classifier(base))).max() > 0.1
  np.testing.assert_allclose(after, before, atol=1e-4)


def test_the_nearest_adapter_of_a_lower_rank_says_what_is_lost():
  rng = np.random.default_rng(0)
  pair = {
    "lora_A": rng.standard_normal((6, 20)).astype(np.float32),
    "lora_B": rng.standard_normal((12, 6)).astype(np.float32),
  }
  change = pair["lora_B"] @ pair["lora_A"]
  values = np.linalg.svd(change)[1]
  for rank in (1, 4, 6, 9):
    nearest, lost = truncated({"x": pair}, rank)
    made = nearest["x"]["lora_B"] @ nearest["x"]["lora_A"]
    assert len(nearest["x"]["lora_A"]) == rank
    gap = np.linalg.norm(made - change) / np.linalg.norm(change)
    share = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    np.testing.assert_allclose([gap, lost], share, atol=1e-6)


def test_a_rank_beyond_the_server_s_is_cut_or_refused(vera, tmp_path):
  file = tmp_path / "a.gguf"
  with pytest.raises(UserError, match="LoRA .* has rank 64, .*--truncate=16 w"):
    export_gguf_adapter(vera, file, max_rank=16)
  assert not file.exists()
  about = export_gguf_adapter(
    vera, file, max_rank=16, truncate=16, format="F16"
  )
  assert about["rank"] == 16 and 0 < about["lost"] < 1
  assert {x.format for x in read_gguf(file).tensors.values()} == {"F16"}


@pytest.mark.parametrize("method", ["vera", "lora_fa"])
def test_peft_s_lora_is_cut_to_a_rank_and_says_what_is_lost(
  method, bases, tmp_path
):
  write_adapter(
    tmp_path / "a",
    method,
    base=bases["llama"],
    kind=KIND,
    rank=48,
    targets=LLAMA,
  )
  limits = {"truncate": 40, "max_rank": 40}
  _, nothing = export_adapter(tmp_path / "a", tmp_path / "x", method="lora")
  _, lost = export_adapter(
    tmp_path / "a", tmp_path / "y", method="lora", **limits
  )
  shares = [nothing]
  for name, change in changes_of(tmp_path / "x").items():
    U, values, V = np.linalg.svd(change, full_matrices=False)
    nearest = (U[:, :40] * values[:40]) @ V[:40]
    found = changes_of(tmp_path / "y")[name]
    np.testing.assert_allclose(found, nearest, atol=1e-5 * values[0])
    shares.append(np.linalg.norm(values[40:]) / np.linalg.norm(values))
  assert lost == pytest.approx(max(shares), rel=1e-4) and lost > 1e-3
  with pytest.raises(UserError, match="has rank 48, more than --max_rank=47"):
    export_adapter(tmp_path / "a", tmp_path / "z", method="lora", max_rank=47)
  if method == "vera":
    with pytest.raises(UserError, match="--max_rank are for --as=lora"):
      export_adapter(tmp_path / "a", tmp_path / "z", truncate=40)
  assert not (tmp_path / "z").exists()


def changes_of(folder):
  """A PEFT folder's change of each module's weights."""
  fields, tensors = read_json(folder / SETTINGS), read_tensors(folder / FILE)[0]
  rank = fields["r"]
  scale = fields["lora_alpha"] / (
    rank**0.5 if fields.get("use_rslora") else rank
  )
  assert {x.shape[0] for k, x in tensors.items() if "lora_A" in k} == {rank}
  return {
    key: scale * tensors[key.replace("lora_A", "lora_B")] @ value
    for key, value in tensors.items()
    if "lora_A" in key
  }


def test_what_has_no_place_in_a_file_is_refused(bases, vera, tmp_path):
  base, file = bases["llama"], tmp_path / "a.gguf"
  targets = {"targets": LLAMA}
  for method, words in (("ia3", "no LoRA, and llama.cpp"), ("dvora", "magnit")):
    write_adapter(tmp_path / method, method, base=base, kind=KIND, **targets)
    with pytest.raises(UserError, match=f"{words}.*--as=merged"):
      export_gguf_adapter(tmp_path / method, file)
  export_gguf_adapter(vera, file)
  with pytest.raises(UserError, match="there already"):
    export_gguf_adapter(vera, file)
  with pytest.raises(UserError, match="of a 'llama', and .* is a 'gpt2'"):
    import_gguf_adapter(file, tmp_path / "b", base=str(bases["gpt2"]))
  gguf = read_gguf(file)
  changes = {
    "is no LoRA adapter": {"general.type": "model"},
    "adapter.lora.alpha is nan": {"adapter.lora.alpha": float("nan")},
  }
  harmed = tmp_path / "harmed.gguf"
  for words, keys in changes.items():
    write_gguf(harmed, gguf.metadata | keys, {})
    with pytest.raises(UserError, match=words):
      import_gguf_adapter(harmed, tmp_path / "b", base=str(base))
  one = Written("F32", (2, 64), lambda: np.ones((2, 64), np.float32))
  for words, name in {
    "no A and B of one rank": "blk.0.attn_q.weight.lora_a",
    "is no matrix of a 'llama'": "blk.0.attn_q.weight.lora_c",
  }.items():
    write_gguf(harmed, gguf.metadata, {name: one})
    with pytest.raises(UserError, match=words):
      import_gguf_adapter(harmed, tmp_path / "b", base=str(base))


@pytest.mark.slow
def test_the_command_writes_adapters_and_models(bases, vera, tmp_path):
  file, model = tmp_path / "a.gguf", tmp_path / "model.gguf"
  export = ["experiments.gguf", "export", f"--adapter={vera}"]
  cut, merged, back, nothing = run_each(
    [*export, f"--out={file}", "--truncate=8", "--type=f16"],
    [*export, f"--out={model}", "--as=merged", "--type=bf16"],
    [
      *("experiments.gguf", "import", f"--adapter={file}"),
      *(f"--base={bases['llama']}", f"--out={tmp_path / 'back'}"),
    ],
    [*export, f"--out={tmp_path / 'b.gguf'}", "--type=q8_0"],
  )
  assert "8 modules, rank 8" in cut.stdout and "% is lost" in cut.stdout
  assert "BF16" in merged.stdout
  assert "rank 8, " in back.stdout, back.stderr
  assert nothing.returncode == 1 and "--type=f32, f16 or" in nothing.stderr
  assert load_adapter(tmp_path / "back").about["settings"]["rank"] == 8
  written = read_gguf(model).tensors["blk.0.attn_q.weight"]
  assert written.format == "BF16"
