"""PEFT's adapters on ViT and DINOv2, whose modules have two spellings."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.pictures import PREPROCESSOR, VIT
from vera_jax.adapters.files import load_adapter
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.pretrained.classifier import restore_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FIELDS = {k: v for k, v in VIT.items() if k != "model_type"}
NAMES = {"vit": "ViT", "dinov2": "Dinov2"}
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tmp_path_factory):
  """(kind, base's folder, PEFT's model, its saved folder), all random: VeRA on
  ViT, LoRA on DINOv2."""
  kind, name = request.param, NAMES[request.param]
  torch.manual_seed(0)
  fields = dict(FIELDS)
  if kind == "dinov2":
    fields["mlp_ratio"] = 2
    del fields["intermediate_size"]
  config = getattr(transformers, f"{name}Config")(
    **fields, initializer_range=0.2, num_labels=3
  )
  model = getattr(transformers, f"{name}ForImageClassification")(config)
  folder = tmp_path_factory.mktemp(kind)
  model.save_pretrained(folder / "base")
  text = json.dumps(PREPROCESSOR)
  (folder / "base/preprocessor_config.json").write_text(text)
  options = {
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["classifier"],
  }
  method = peft.VeraConfig if kind == "vit" else peft.LoraConfig
  adapted = peft.get_peft_model(model, method(**options)).eval()
  with torch.no_grad():
    for leaf in adapted.parameters():
      if leaf.requires_grad:
        leaf.add_(0.3 * torch.randn_like(leaf))
  adapted.save_pretrained(folder / "theirs")
  return kind, folder / "base", adapted, folder / "theirs"


def torch_logits(model):
  with torch.no_grad():
    return model(pixel_values=torch.from_numpy(PIXELS)).logits.numpy()


def our_logits(folder):
  model = restore_adapter(load_adapter(folder))
  pixels = jax.numpy.asarray(PIXELS.transpose(0, 2, 3, 1))
  return model.module.apply(model.variables, pixel_values=pixels)[:, 0]


def test_there_and_back(trained, tmp_path):
  kind, base, model, theirs = trained
  want = torch_logits(model)
  about = import_adapter(theirs, tmp_path / "ours", base=str(base))
  assert about["settings"]["targets"] == ["query", "value"]
  np.testing.assert_allclose(our_logits(tmp_path / "ours"), want, atol=1e-4)
  assert np.ptp(want, axis=0).min() > 0.01
  export_adapter(tmp_path / "ours", tmp_path / "again")
  peer = getattr(transformers, f"{NAMES[kind]}ForImageClassification")
  again = peft.PeftModel.from_pretrained(
    peer.from_pretrained(base, num_labels=3), tmp_path / "again"
  ).eval()
  np.testing.assert_allclose(torch_logits(again), want, atol=1e-5)
  named = again.peft_config["default"].target_modules
  assert set(named) == {"q_proj", "v_proj"}


def test_a_folder_of_an_older_transformers_is_read(trained, tmp_path):
  """Before 5.24 the modules of its classes had the names of the files."""
  kind, base, model, theirs = trained
  folder = tmp_path / "older"
  folder.mkdir()
  settings = json.loads((theirs / "adapter_config.json").read_text())
  settings["target_modules"] = ["query", "value"]
  (folder / "adapter_config.json").write_text(json.dumps(settings))
  tensors = {}
  for name, value in load_file(theirs / "adapter_model.safetensors").items():
    for new, old in (
      ("vit.layers", "vit.encoder.layer"),
      ("attention.q_proj", "attention.attention.query"),
      ("attention.v_proj", "attention.attention.value"),
    ):
      name = name.replace(new, old)
    tensors[name] = value
  save_file(tensors, folder / "adapter_model.safetensors")
  import_adapter(folder, tmp_path / "ours", base=str(base))
  found, want = our_logits(tmp_path / "ours"), torch_logits(model)
  np.testing.assert_allclose(found, want, atol=1e-4)
