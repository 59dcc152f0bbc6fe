"""PEFT's adapters on decoders, there and back, and their merged folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.decoders import CASES, GPT2, random_peer
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.export.hf import write_merged
from vera_jax.models.decoder import logits
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.pretrained.classifier import load_classifier, restore_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IDS = np.random.default_rng(1).integers(3, 50, (2, 9)).astype(np.int32)
DROPLESS = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
FIELDS = {"gpt2": GPT2 | DROPLESS, "llama": CASES["llama_biases"]}
QWEN = {"qwen3": CASES["qwen3"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  folders = {}
  for kind, fields in (FIELDS | QWEN).items():
    folders[kind] = tmp_path_factory.mktemp(kind)
    random_peer(fields, folders[kind])
  return folders


def torch_base(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def torch_logits(model):
  with torch.no_grad():
    return model(input_ids=torch.from_numpy(IDS).long()).logits.numpy()


def our_logits(model):
  words = jax.jit(model.module.apply)(model.variables, jnp.asarray(IDS))
  return logits(words)


def trained_by_peft(base, config, folder):
  model = peft.get_peft_model(torch_base(base), config)
  own = [x for x in model.parameters() if x.requires_grad]
  optimiser = torch.optim.AdamW(own, lr=1e-1)
  ids = torch.from_numpy(IDS).long()
  for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
  model.save_pretrained(folder)
  return model.eval()


VERA = {"projection_prng_key": 3, "r": 4}
CONFIGS = [
  ("gpt2", "VeraConfig", {**VERA, "save_projection": False}, ["c_attn"]),
  ("gpt2", "LoraConfig", {"r": 2, "target_modules": "all-linear"}, None),
  ("llama", "VeraConfig", VERA, ["q_proj", "v_proj"]),
  (
    "llama",
    "LoraConfig",
    {"r": 2, "use_dora": True, "target_modules": ["o_proj", "up_proj"]},
    ["mlp/up_proj", "o_proj"],
  ),
  ("qwen3", "LoraConfig", {"r": 2, "target_modules": ["q_proj"]}, ["q_proj"]),
]


@pytest.mark.parametrize("kind, name, options, patterns", CONFIGS)
def test_there_and_back(bases, kind, name, options, patterns, tmp_path):
  base = bases[kind]
  options = {"task_type": "CAUSAL_LM", **options}
  config = getattr(peft, name)(**options)  # VeRA's targets are PEFT's own
  model = trained_by_peft(base, config, tmp_path / "theirs")
  want = torch_logits(model)
  assert np.abs(want - torch_logits(torch_base(base))).max() > 0.1
  about = import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(base))
  assert (about["kind"], about["labels"]) == ("language_modelling", [])
  if patterns is not None:
    found = [pattern.split("/")[-1] for pattern in about["settings"]["targets"]]
    assert found == [pattern.split("/")[-1] for pattern in patterns]
  ours = restore_adapter(load_adapter(tmp_path / "ours"))
  np.testing.assert_allclose(our_logits(ours), want, atol=1e-4)
  export_adapter(tmp_path / "ours", tmp_path / "again")
  again = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "again")
  np.testing.assert_allclose(torch_logits(again), want, atol=1e-5)
  assert again.peft_config["default"].fan_in_fan_out == (kind == "gpt2")

  write_merged(ours, tmp_path / "merged")
  merged, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "merged", output_loading_info=True
  )
  assert not any(info[x] for x in ("missing_keys", "unexpected_keys"))
  np.testing.assert_allclose(torch_logits(merged.eval()), want, atol=1e-4)
  back = load_classifier(tmp_path / "merged")
  assert (back.kind, back.labels) == ("language_modelling", ())
  np.testing.assert_allclose(our_logits(back), want, atol=1e-4)


@pytest.mark.parametrize(
  "own, method", [("vera", "vera"), ("vera", "lora"), ("lora", "lora")]
)
def test_query_and_value_are_a_whole_c_attn_of_twice_the_rank(
  bases, random_adapter, own, method, tmp_path
):
  base = bases["gpt2"]
  folder = random_adapter(own, base=base, kind="language_modelling")
  ours = restore_adapter(load_adapter(folder))
  export_adapter(folder, tmp_path / "theirs", method=method)
  theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "theirs")
  config = theirs.peft_config["default"]
  assert config.r == 2 * ours.about["settings"]["rank"]
  assert config.target_modules == {"c_attn"}
  want = torch_logits(theirs)
  assert np.abs(want - torch_logits(torch_base(base))).max() > 0.1
  np.testing.assert_allclose(our_logits(ours), want, atol=1e-4)
  import_adapter(tmp_path / "theirs", tmp_path / "back")
  back = restore_adapter(load_adapter(tmp_path / "back"))
  np.testing.assert_allclose(our_logits(back), want, atol=1e-4)


def test_a_head_that_the_base_has_not(bases, tmp_path):
  options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
  config = peft.LoraConfig(**options)
  trained_by_peft(bases["qwen3"], config, tmp_path / "theirs")
  file = tmp_path / "theirs/adapter_config.json"
  text = file.read_text()
  file.write_text(text.replace("CAUSAL_LM", "SEQ_CLS"))
  with pytest.raises(UserError, match="the base is qwen3, which has no such"):
    import_adapter(
      tmp_path / "theirs", tmp_path / "ours", base=str(bases["qwen3"])
    )
  file.write_text(
    text.replace('"fan_in_fan_out": false', '"fan_in_fan_out": true')
  )
  with pytest.raises(UserError, match="set it to false"):
    import_adapter(
      tmp_path / "theirs", tmp_path / "ours", base=str(bases["qwen3"])
    )
