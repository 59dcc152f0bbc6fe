"""Every further family from its files to its files, through torch and a run."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from tests.conftest import WORDS
from tests.faults.fixtures import random_encoder
from tests.models.test_families import FIELDS
from vera_jax import load_adapter, restore_adapter
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.export.hf import write_merged
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params, to_hf
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import load_classifier
from vera_jax.report.spectra import deltas
from vera_jax.serve.predictor import Predictor
from vera_jax.train.loop import train_and_evaluate

FIRST = ["word1 word2 word3", "word9", "word4 word4 word20 word7"]
SECOND = ["word5", "word8 word1", "word0"]
SIZES = {"vocab_size": 60, "max_position_embeddings": 24, "num_labels": 3}
BERTS = {
  **SIZES,
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "pad_token_id": 1,
  "type_vocab_size": 1,
}
MODERN = {
  **BERTS,
  "num_hidden_layers": 3,
  "global_attn_every_n_layers": 2,
  "local_attention": 4,
  "bos_token_id": 2,
  "eos_token_id": 3,
  "cls_token_id": 2,
  "sep_token_id": 3,
}
ALL_BIASES = dict.fromkeys(
  ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True
)
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
CASES = [
  ("DistilBert", {**SIZES, **DISTIL, "pad_token_id": 1}, True),
  ("ModernBert", MODERN, True),
  ("ModernBert", {**MODERN, **ALL_BIASES, "classifier_pooling": "mean"}, False),
  ("XLMRoberta", BERTS, False),
  ("Camembert", BERTS, False),
]


@pytest.mark.parity
@pytest.mark.parametrize("name, fields, scan", CASES)
def test_logits_equal_torchs_and_tensors_return(name, fields, scan, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = getattr(transformers, f"{name}Config")(**fields)
  peer = getattr(transformers, f"{name}ForSequenceClassification")(config)
  with torch.no_grad():
    for path, value in peer.eval().named_parameters():
      value.normal_(std=0.2)
      value.add_("norm" in path.lower() and path.endswith("weight"))
  peer.save_pretrained(tmp_path)
  plan = blueprint(read_fields(tmp_path), outputs=3, scan=scan)
  loaded = load_params(tmp_path, unflatten_dict(plan.shapes))
  assert loaded[1:] == ((), (), ())
  rng = np.random.default_rng(3)
  mask = (np.arange(11) < np.array([[11], [4], [1]])).astype(np.int64)
  ids = np.where(mask, rng.integers(5, 60, (3, 11)), config.pad_token_id)
  with torch.no_grad():
    tensors = torch.from_numpy(ids), torch.from_numpy(mask)
    want = peer(tensors[0], attention_mask=tensors[1]).logits.numpy()
  run = jax.jit(plan.module.apply)
  got = run({"params": loaded.params}, ids.astype(np.int32))[:, 0]
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.ptp(want, axis=0).min() > 0.01
  tensors, state = to_hf(loaded.params, plan.config), peer.state_dict()
  assert tensors.keys() == state.keys()
  for path, value in tensors.items():
    np.testing.assert_array_equal(value, state[path].numpy(), err_msg=path)


@pytest.fixture(params=["distilbert", "modernbert"])
def base(request, tiny_model, tmp_path):
  """A random pretrained encoder, as its masked language model's file has it."""
  kind, folder = request.param, tmp_path / "base"
  folder.mkdir()
  tensors = random_encoder(FIELDS[kind])
  new = ("classifier.", "pre_classifier.")
  tensors = {n: x for n, x in tensors.items() if not n.startswith(new)}
  tensors[
    "vocab_projector.bias" if kind == "distilbert" else "decoder.bias"
  ] = np.zeros(50, np.float32)
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(FIELDS[kind]))
  if kind == "distilbert":
    shutil.copy(tiny_model / "vocab.txt", folder)
  else:
    load_tokenizer(tiny_model).save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
  return kind, folder


@pytest.mark.slow
def test_train_save_load_predict_merge(base, tiny_config, tmp_path):
  kind, folder = base
  config = tiny_config(
    "rte",
    model__name=str(folder),
    data__max_train_examples=8,
    optim__epochs=1,
    optim__batch_size=8,
    optim__microbatch_rows=8,
    eval_batch_size=32,
  )
  result = train_and_evaluate(config, tmp_path / "run")
  layers, head = (2, 16 * 17 + 17 * 2) if kind == "distilbert" else (3, 17 * 2)
  assert result["parameters"]["adapter"] == layers * 2 * (8 + 16)
  assert result["parameters"]["head"] == head
  restored = restore_adapter(load_adapter(tmp_path / "run/adapter"))
  norms = [np.abs(x).max() for x in deltas(restored).values()]
  assert len(norms) == layers * 2 and min(norms) > 0
  assert {kind for _, kind in deltas(restored)} == {"query", "value"}
  want = Predictor(restored).logits(FIRST, SECOND)
  about = write_merged(restored, tmp_path / "out")
  assert about["differences"]["float32"] < 1e-5
  merged = load_classifier(tmp_path / "out")
  before, after = map(flatten_dict, (restored.params, merged.params))
  changed = [p for p in after if not np.array_equal(before[p], after[p])]
  assert {path[-1] for path in changed} == {"kernel"}
  if kind == "modernbert":  # of a fused kernel only query and value moved
    path = next(path for path in changed if "layer" in path)
    parts = np.split(np.abs(after[path] - before[path]), 3, axis=-1)
    assert [bool(part.max() > 0) for part in parts] == [True, False, True]

  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  auto = transformers.AutoModelForSequenceClassification
  peer, loading = auto.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(loading.values()), loading
  tokenizer = load_tokenizer(tmp_path / "out")
  inputs = tokenizer(FIRST, SECOND, padding=True, return_tensors="pt")
  inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
  with torch.no_grad():
    theirs = peer.eval()(**inputs).logits.numpy()
  np.testing.assert_allclose(want, theirs, rtol=0, atol=1e-4)
  assert len(WORDS) == 25 and np.ptp(theirs) > 1e-2
