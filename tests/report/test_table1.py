"""The paper's Table 1 from shapes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import table1 as script
from vera_jax import adapter_size, find_targets
from vera_jax.adapters.vera import vera
from vera_jax.models.bert import BertClassifier, BertConfig
from vera_jax.report.table1 import MODELS, parameters, table1

ROOT = Path(__file__).resolve().parents[2]


def test_the_formulas():
  for model, (layers, width) in MODELS.items():
    for rank in (1, 16, 256):
      vera, lora = (parameters(m, model, rank) for m in ("vera", "lora"))
      assert vera == 2 * layers * (width + rank)
      assert lora == 2 * 2 * layers * width * rank


def test_the_model_itself_has_the_same():
  layers, width = MODELS["RoBERTa-base"]
  config = BertConfig.from_dict(
    {
      "model_type": "roberta",
      "vocab_size": 100,
      "hidden_size": width,
      "num_hidden_layers": layers,
      "num_attention_heads": 12,
      "intermediate_size": 4 * width,
      "max_position_embeddings": 514,
    }
  )
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  targets = find_targets(BertClassifier(config, 2), ("query", "key"), ids)
  counted = parameters("vera", "RoBERTa-base", 16)
  assert adapter_size(vera(16), targets) == counted


def test_what_contradicts_the_papers_formula_and_nothing_else():
  table = table1()
  assert len(table) == 18
  wrong = table[table["parameters_contradict"] | table["bytes_contradict"]]
  keys = wrong[["model", "method", "rank"]].itertuples(index=False, name=None)
  assert set(keys) == {
    ("RoBERTa-large", "vera", 16),
    ("GPT-3", "vera", 16),
    ("GPT-3", "vera", 256),
  }
  assert wrong.iloc[-1]["parameters"] == 2_408_448
  assert wrong.iloc[-1]["paper_parameters"] == pytest.approx(8.7e6)


@pytest.mark.skipif(
  not (ROOT / "docs/table1.md").exists(), reason="not in a checkout"
)
def test_the_page_is_what_the_script_prints():
  page = (ROOT / "docs/table1.md").read_text(encoding="utf-8")
  assert page == script.page(table1())
