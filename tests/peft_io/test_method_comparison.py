"""The experiments for PEFT's method comparison, loaded by PEFT on a tiny
Llama."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
FOLDER = Path(__file__).resolve().parents[2] / "examples/peft_method_comparison"
EXPERIMENTS = sorted(FOLDER.glob("MetaMathQA/experiments/*/*"))
WIDTHS = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
WIDTHS |= {"gate_proj": 64, "up_proj": 64, "down_proj": 32}


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda x: x.name)
def test_peft_trains_and_saves_an_experiment(folder, tmp_path):
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  fields = {"num_key_value_heads": 1, "vocab_size": 32, "hidden_size": 32}
  fields |= {"num_attention_heads": 2, "intermediate_size": 64}
  base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **fields))
  before = {name: x.clone() for name, x in base.state_dict().items()}
  config = peft.PeftConfig.from_pretrained(folder)
  model = peft.get_peft_model(base, config, autocast_adapter_dtype=True)
  trained, _ = model.get_nb_trainable_parameters()
  widths = [WIDTHS[name] for name in config.target_modules]
  assert trained == 2 * (sum(widths) + len(widths) * config.r)

  # the suite's training, in short
  settings = json.loads((folder / "training_params.json").read_text())
  assert set(settings) == {"optimizer_kwargs"}
  leaves = [x for x in model.parameters() if x.requires_grad]
  optimiser = torch.optim.AdamW(leaves, **settings["optimizer_kwargs"])
  ids = torch.randint(0, 32, (2, 8))
  losses = []
  for _ in range(3):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    losses.append(float(loss))
  assert losses[2] < losses[0]

  model.eval()
  logits = model(input_ids=ids).logits
  model.save_pretrained(tmp_path)
  fresh = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **fields))
  fresh.load_state_dict(before)
  again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
  assert torch.equal(again(input_ids=ids).logits, logits)


def test_the_folders_are_as_the_suite_has_them():
  assert len(EXPERIMENTS) == 4
  for folder in EXPERIMENTS:
    assert folder.parent.name == "vera"
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "training_params.json"}
    settings = json.loads((folder / "training_params.json").read_text())
    assert folder.name.endswith(f"lr_{settings['optimizer_kwargs']['lr']}")
