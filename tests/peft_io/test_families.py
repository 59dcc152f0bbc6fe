"""PEFT's adapters on DistilBERT and ModernBERT."""

import numpy as np
import pytest

from tests.conftest import TINY
from tests.models.decoders import CASES as DECODERS
from tests.models.test_families import CASES as FAMILIES
from tests.peft_io.test_parity import (
  IDS,
  assert_same,
  loaded_by_peft,
  trained_by_peft,
)
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.peft_io.base import linear_layers
from vera_jax.pretrained.blueprint import blueprint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIZES = {"vocab_size": 100, "max_position_embeddings": 40, "pad_token_id": 0}
MODERN = {
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "cls_token_id": 1,
  "sep_token_id": 2,
}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
BERT = {key: MODERN[key] for key in list(MODERN)[:4]}
TARGETS = {"distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """Random folders: an encoder, and a masked language model with its head."""
  made = {
    "distilbert": transformers.DistilBertModel(
      transformers.DistilBertConfig(**SIZES, **DISTIL, initializer_range=0.2)
    ),
    "bert": transformers.BertModel(
      transformers.BertConfig(**SIZES, **BERT, initializer_range=0.2)
    ),
    "modernbert": transformers.ModernBertForMaskedLM(
      transformers.ModernBertConfig(**SIZES, **MODERN, initializer_range=0.2)
    ),
  }
  folders = {}
  for kind, model in made.items():
    folders[kind] = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folders[kind])
  return folders


@pytest.mark.parametrize("kind", TARGETS)
def test_there_and_back(bases, kind, tmp_path):
  """VeRA on DistilBERT, LoRA on ModernBERT's fused layer as a whole."""
  options = {"r": 4, "target_modules": TARGETS[kind], "task_type": "SEQ_CLS"}
  config = (
    peft.VeraConfig(**options)
    if kind == "distilbert"
    else peft.LoraConfig(**options)
  )
  model = trained_by_peft(bases[kind], config, tmp_path / "theirs")
  about = import_adapter(
    tmp_path / "theirs", tmp_path / "ours", base=str(bases[kind])
  )
  patterns = {"distilbert": ["query", "value"], "modernbert": ["Wqkv"]}
  assert about["settings"]["targets"] == patterns[kind]
  assert_same(tmp_path / "ours", bases[kind], model)
  export_adapter(tmp_path / "ours", tmp_path / "again")
  again = loaded_by_peft(bases[kind], tmp_path / "again")
  with torch.no_grad():
    ids = torch.from_numpy(IDS)
    want, got = (m(input_ids=ids).logits.numpy() for m in (model, again))
  np.testing.assert_allclose(got, want, atol=1e-5)
  named = again.peft_config["default"].target_modules
  assert set(named) == set(TARGETS[kind])


@pytest.mark.parametrize(
  "kind, module", [("bert", "pooler"), ("modernbert", "head")]
)
def test_a_module_of_the_base_that_was_trained_whole(
  bases, kind, module, tmp_path
):
  """It is in the base's file, too, and the adapter's takes its place."""
  config = peft.LoraConfig(
    r=2,
    target_modules=["query"] if kind == "bert" else ["Wqkv"],
    modules_to_save=[module],
    task_type="SEQ_CLS",
  )
  model = trained_by_peft(bases[kind], config, tmp_path / "theirs")
  base = str(bases[kind])
  import_adapter(tmp_path / "theirs", tmp_path / "ours", base=base)
  assert_same(tmp_path / "ours", base, model)
  saved = load_adapter(tmp_path / "ours")
  assert any(name.startswith(f"{module}.") for name in saved.tensors)
  export_adapter(tmp_path / "ours", tmp_path / "again")
  assert_same(tmp_path / "ours", base, loaded_by_peft(base, tmp_path / "again"))


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_parts_of_a_fused_layer_are_joined(
  bases, random_adapter, method, tmp_path
):
  """Query and value of ModernBERT, as an adapter of the whole layer."""
  ours = random_adapter(base=bases["modernbert"], task="mnli", rank=4)
  export_adapter(ours, tmp_path / "theirs", method=method)
  model = loaded_by_peft(bases["modernbert"], tmp_path / "theirs")
  assert model.peft_config["default"].r == 8
  assert_same(ours, bases["modernbert"], model)
  import_adapter(tmp_path / "theirs", tmp_path / "back")
  assert_same(tmp_path / "back", bases["modernbert"], model)


def test_parts_that_peft_has_no_place_for(bases, random_adapter, tmp_path):
  base = bases["modernbert"]
  mixed = random_adapter(
    base=base, task="mnli", rank=4, targets=["query", "attn/Wo"]
  )
  with pytest.raises(UserError, match="parts of fused layers beside other"):
    export_adapter(mixed, tmp_path / "theirs")
  export_adapter(mixed, tmp_path / "lora", method="lora")
  assert_same(mixed, base, loaded_by_peft(base, tmp_path / "lora"))
  scaled = random_adapter("ia3", base=base, task="mnli")
  with pytest.raises(
    UserError, match=r"Wqkv.(key|value) is a part .*targets=\('Wqk"
  ):
    export_adapter(scaled, tmp_path / "theirs")
  assert not (tmp_path / "theirs").exists()


ENCODERS = {
  "bert": TINY,
  "roberta": {**TINY, "model_type": "roberta"},
  **{name: FAMILIES[name] for name in ("distilbert", "modernbert")},
}


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_layers_come_in_the_order_of_torchs_modules(name):
  """By which Uni-LoRA shares its vector out, on both sides."""
  fields = (ENCODERS | DECODERS)[name]
  head, auto = "classification", transformers.AutoModelForSequenceClassification
  if name in DECODERS:
    head, auto = "language_modelling", transformers.AutoModelForCausalLM
  ours = list(
    linear_layers(blueprint(fields, outputs=2, head=head, scan=False))
  )
  with torch.device("meta"):
    model = auto.from_config(transformers.AutoConfig.for_model(**fields))
  theirs = [module for module, _ in model.named_modules() if module in ours]
  assert theirs == [module for module in ours if module in theirs]
  assert len(theirs) >= 8
