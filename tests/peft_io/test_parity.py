"""Adapters to and from PEFT, live: the same logits on both sides."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.peft_steps import compare
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.files import load_adapter, save_adapter
from vera_jax.adapters.labels import count, label_tree, split
from vera_jax.adapters.lora import lora
from vera_jax.adapters.projections import PRNG, digest
from vera_jax.adapters.vera import vera
from vera_jax.models.bert import BertClassifier
from vera_jax.models.hf_weights import (
  fingerprint,
  load_config,
  load_params,
  module_path,
)
from vera_jax.peft_io import export_adapter, import_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
  pytest.mark.parity,
  # PEFT's own, at import and construction
  pytest.mark.filterwarnings("ignore"),
]

LABELS, RANK = 3, 8
SIZES = {
  "vocab_size": 100,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "max_position_embeddings": 40,
  "initializer_range": 0.2,
}
KINDS = {
  "bert": (transformers.BertConfig, transformers.BertModel),
  "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
}
DIFFERENT = ("query", "value", "intermediate/dense")  # shapes, that is
THEIRS = ["query", "value", "intermediate.dense"]
IDS = np.random.default_rng(1).integers(5, 100, (3, 9))
VERA = {
  "d_init": 0.1,
  "init": "kaiming_uniform",
  "projection_seed": 0,
  "sharing": "shared",
  "train": "both",
}
WAYS = {
  "list": {"target_modules": THEIRS},
  "regex": {"target_modules": r".*layer\.1\..*(query|output\.dense)"},
  "some layers": {
    "target_modules": THEIRS,
    "layers_to_transform": [1],
    "layers_pattern": "layer",
  },
  "whole names": {
    "target_modules": "all-linear",
  },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """Random encoders' folders by kind, without a head."""
  folders = {}
  for kind, (config, model) in KINDS.items():
    folders[kind] = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    model(config(**SIZES)).save_pretrained(folders[kind])
  return folders


def their_base(base):
  torch.manual_seed(1)  # of the new head
  return transformers.AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=LABELS
  ).eval()


def trained_by_peft(base, config, folder):
  """An adapter that PEFT trained for a few steps, and its model."""
  model = peft.get_peft_model(their_base(base), config)
  rates = [
    {
      "params": [p for n, p in model.named_parameters() if own(n, p)],
      "lr": rate,
    }
    for own, rate in (
      (lambda n, p: p.requires_grad and "classifier" in n, 1e-2),
      (lambda n, p: p.requires_grad and "classifier" not in n, 1e-1),
    )
  ]
  optimiser = torch.optim.AdamW(rates)
  labels = torch.tensor([0, 1, 2])
  for _ in range(3):
    model(input_ids=torch.from_numpy(IDS), labels=labels).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
  model.save_pretrained(folder)
  return model.eval()


def their_logits(model):
  """With the adapter, and with its layers (not the head) switched off."""
  ids = torch.from_numpy(IDS)
  with torch.no_grad():
    logits = model(input_ids=ids).logits.numpy()
    model.base_model.disable_adapter_layers()
    bare = model(input_ids=ids).logits.numpy()
    model.base_model.enable_adapter_layers()
  return logits, bare


def loaded_by_peft(base, folder):
  return peft.PeftModel.from_pretrained(their_base(base), folder).eval()


def parts(about):
  given = about["settings"]
  if about["method"] == "lora":
    return lora(given["rank"], alpha=given["alpha"])
  names = ("rank", "d_init", "projection_seed", "train", "sharing")
  known = {name: given[name] for name in names}
  init = given["init"] if given["init"] != "stored" else "peft"
  return vera(**known, init=init)


def our_logits(folder, base):
  """By hand from the folder's two files."""
  about = json.loads((folder / "adapter.json").read_text())
  tensors = load_adapter(folder).tensors
  model = BertClassifier(load_config(base), LABELS, scan=False)
  adapted = adapt(model, parts(about), targets=about["settings"]["targets"])
  ids = jnp.asarray(IDS)
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), ids)
  plain = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  leaves = flatten_dict(load_params(base, plain).params)
  own, stored = {}, {}
  for name, value in tensors.items():
    module, _, leaf = name.rpartition(".")
    if module == "projections":
      stored[leaf] = value
    else:
      own[(*module_path(module), leaf)] = value
  variables = {"params": unflatten_dict(leaves | own)}
  want = jax.tree.map(jnp.shape, shapes["params"])
  assert jax.tree.map(jnp.shape, variables["params"]) == want
  if about["method"] == "vera":
    targets = adapted.find_targets(ids)
    made = stored or adapted.adapter.projections(targets)
    if about["settings"]["sharing"] == "shared":  # else it is the scanned one's
      assert digest(made) == about["projection_digest"]
    assert bool(stored) == (about["settings"]["init"] == "stored")
    variables["projections"] = made
  logits = jax.jit(adapted.apply)(variables, ids)[:, 0]
  counts = about["parameters"]
  assert counts["adapter"] + counts["head"] == sum(x.size for x in own.values())
  return np.asarray(logits)


def same(one, other, bare):
  print("largest logit difference", np.abs(one - other).max())
  np.testing.assert_allclose(one, other, atol=1e-4)
  assert np.abs(other - bare).max() > 0.01


@pytest.mark.parametrize(
  "kind, way, saved",
  [
    ("bert", "list", True),
    ("roberta", "list", False),
    ("bert", "regex", False),
    ("bert", "some layers", True),
    ("roberta", "whole names", True),
  ],
)
def test_vera_from_peft(bases, kind, way, saved, tmp_path):
  config = peft.VeraConfig(
    task_type="SEQ_CLS",
    r=RANK,
    projection_prng_key=2**32 + 7,
    save_projection=saved,
    **WAYS[way],
  )
  model = trained_by_peft(bases[kind], config, tmp_path / "theirs")
  about = import_adapter(
    tmp_path / "theirs", tmp_path / "ours", base=str(bases[kind])
  )
  same(our_logits(tmp_path / "ours", bases[kind]), *their_logits(model))
  assert about["settings"]["init"] == "peft"
  assert about["settings"]["projection_seed"] == 7  # torch takes 32 bits


@pytest.mark.parametrize(
  "kind, way, rslora",
  [
    ("bert", "list", True),
    ("roberta", "some layers", False),
    ("roberta", "regex", True),
  ],
)
def test_lora_from_peft(bases, kind, way, rslora, tmp_path):
  config = peft.LoraConfig(
    task_type="SEQ_CLS",
    r=RANK,
    lora_alpha=6,
    use_rslora=rslora,
    **WAYS[way],
  )
  model = trained_by_peft(bases[kind], config, tmp_path / "theirs")
  import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(bases[kind]))
  same(our_logits(tmp_path / "ours", bases[kind]), *their_logits(model))


def test_an_adapter_without_a_head_takes_the_bases(bases, tmp_path):
  their_base(bases["bert"]).save_pretrained(tmp_path / "base")
  config = peft.LoraConfig(r=4, target_modules=["query"])
  model = peft.get_peft_model(their_base(tmp_path / "base"), config).eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      value += 0.1 * ("lora_B" in name)
  model.save_pretrained(tmp_path / "theirs")
  about = import_adapter(tmp_path / "theirs", tmp_path / "ours")
  assert about["base"] == str(tmp_path / "base")
  same(our_logits(tmp_path / "ours", tmp_path / "base"), *their_logits(model))


def ours_at_random(base, folder, **settings):
  """An adapter of ours with every trained leaf random, in our format."""
  method = "lora" if "alpha" in settings else "vera"
  given = {"rank": RANK, "targets": DIFFERENT, **settings}
  if method == "vera":
    given = {**VERA, **given}
  about = {"method": method, "base": str(base), "settings": given}
  model = BertClassifier(load_config(base), LABELS)
  adapted = adapt(model, parts(about), targets=DIFFERENT)
  ids = jnp.asarray(IDS)
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), ids)["params"]
  labels = label_tree(shapes, method)
  rng = np.random.default_rng(0)
  trained = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    split(shapes, labels)[0],
  )
  counts = count(shapes, labels)._asdict()
  made = adapted.adapter.projections(adapted.find_targets(ids))
  about |= {"projection_digest": digest(made) if made else None}
  about |= {"parameters": counts, "labels": ["a", "b", "c"]}
  about |= {"base_fingerprint": fingerprint(base), "projection_prng": PRNG}
  save_adapter(folder, trained, about=about)


@pytest.mark.parametrize(
  "kind, method, settings",
  [
    ("bert", "vera", {"init": "kaiming_uniform", "projection_seed": 5}),
    ("roberta", "vera", {"init": "peft", "projection_seed": 5}),
    ("roberta", "vera", {"train": "b"}),
    ("bert", "lora", {"alpha": 6.5}),
    ("bert", "lora", {"init": "orthogonal"}),
    ("roberta", "lora", {"train": "d"}),
    ("roberta", "lora", {"sharing": "unique"}),
  ],
)
def test_to_peft(bases, kind, method, settings, tmp_path):
  base = bases[kind]
  ours_at_random(base, tmp_path / "ours", **settings)
  export_adapter(tmp_path / "ours", tmp_path / "theirs", method=method)
  theirs = loaded_by_peft(base, tmp_path / "theirs")
  wanted = peft.PeftType.VERA if method == "vera" else peft.PeftType.LORA
  assert theirs.peft_config["default"].peft_type == wanted
  same(our_logits(tmp_path / "ours", base), *their_logits(theirs))


def test_projections_that_no_key_gives_are_kept(bases, tmp_path):
  base = bases["bert"]
  ours_at_random(base, tmp_path / "ours")
  export_adapter(tmp_path / "ours", tmp_path / "theirs")
  theirs = loaded_by_peft(base, tmp_path / "theirs")
  theirs.save_pretrained(tmp_path / "again")  # without our header
  about = import_adapter(tmp_path / "again", tmp_path / "kept", base=str(base))
  assert about["settings"]["init"] == "stored"
  same(our_logits(tmp_path / "kept", base), *their_logits(theirs))
  export_adapter(tmp_path / "kept", tmp_path / "lora", method="lora")
  as_lora = loaded_by_peft(base, tmp_path / "lora")
  same(our_logits(tmp_path / "kept", base), *their_logits(as_lora))


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_step_by_step_the_same(tiny_config, method):
  targets = ("query", "value", "intermediate/dense")
  config = tiny_config("rte", method=method, vera__targets=targets)
  config.lora.targets = targets
  config.vera.init = "peft"
  result = compare(config, 20)
  assert len(result["peft"]) == len(result["vera_jax"]) == 20
  assert result["peft"][-1] != result["peft"][0]
  assert result["largest_relative_loss_difference"] < 1e-3
  for leaf, apart in result["relative_distance"].items():
    assert apart < 1e-2, leaf
  assert len(result["relative_distance"]) == 2
