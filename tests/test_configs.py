"""Every config builds, says how it is run, and holds the paper's settings."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vera_jax.adapters.methods import METHODS, settings_in
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.train.config import check_settings
from vera_jax.train.optim import rates_of, schedule
from vera_jax.train.setup import build_setup

FOLDER = Path(__file__).resolve().parents[1] / "configs"
NONE = {"__init__", "common", "open_choices", "paper"}  # that train nothing
OWN = {
  "text",
  "language",
  "e2e",
  "e2e_texts",
  "instruct",
}  # with commands of their own
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - {*NONE, *OWN})
GLUE = sorted(set(NAMES) - {"minilm", "quickstart"})

# Table 8: epochs, head's rate, VeRA's rate.
TABLE_8 = {
  "base": {
    "sst2": (60, 4e-3, 4e-3),
    "mrpc": (30, 4e-3, 1e-2),
    "cola": (80, 1e-2, 1e-2),
    "qnli": (25, 4e-3, 1e-2),
    "rte": (160, 1e-2, 4e-3),
    "stsb": (80, 1e-2, 1e-2),
  },
  "large": {
    "sst2": (10, 6e-3, 1e-2),
    "mrpc": (40, 3e-3, 3e-2),
    "cola": (40, 6e-3, 1e-2),
    "qnli": (20, 2e-4, 1e-2),
    "rte": (40, 2e-3, 2e-2),
    "stsb": (20, 2e-3, 2e-2),
  },
}
# The columns' common rows: rank, longest sequence, batch.
COMMON = {"base": (1024, 512, 64), "large": (256, 128, 32)}
# LoRA's own paper, Table 9: its rate.
LORA_TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
LORA = {
  size: {
    task: float(f"{x}e-4") for task, x in zip(LORA_TASKS, rates, strict=True)
  }
  for size, rates in {
    "base": (5, 5, 4, 4, 4, 5, 5, 4),
    "large": (3, 4, 3, 2, 2, 3, 4, 2),
  }.items()
}


def load(name, *variant):
  return importlib.import_module(f"configs.{name}").get_config(*variant)


def test_all_nine_tasks_have_a_config():
  assert set(GLUE) == {*LORA["base"], "wnli"}


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("name", TABLE_8["base"])
def test_the_papers_settings(name, size):
  config = load(name, size)
  optim, vera = config.optim, config.vera
  rates = config.optim.epochs, vera.head_lr, vera.lr
  assert rates == TABLE_8[size][name]
  assert (vera.rank, config.data.max_length, optim.batch_size) == COMMON[size]
  assert vera.targets == ("query", "value")
  assert (vera.d_init, vera.init) == (0.1, "kaiming_uniform")
  assert (vera.train, vera.sharing) == ("both", "shared")
  assert optim.warmup_ratio == 0.06
  assert optim.adapter_lr is None and optim.head_lr is None


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("name", LORA["base"])
def test_loras_own_settings(name, size):
  lora = load(name, size).lora
  assert lora.lr == lora.head_lr == LORA[size][name]
  assert (lora.rank, lora.targets) == (8, ("query", "value"))
  assert lora.alpha == {"base": 8, "large": 16}[size]


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("name", GLUE)
def test_every_method_has_its_settings(name, size):
  config = load(name, size)
  assert config.task == name and config.model.name == f"roberta-{size}"
  for method in METHODS:
    config.method = method
    check_settings(config)


@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "rte", "wic"])
def test_superglues_configs(name):
  module = importlib.import_module(f"configs.superglue.{name}")
  file = f"configs/superglue/{name}.py"
  for size in ("base", "large", "minilm"):
    config = module.get_config(size)
    assert config.task == f"superglue_{name}"
    assert config.data.source == "aps/super_glue"
    variant = "" if size == "base" else f":{size}"
    assert f"experiments.glue --config={file}{variant}" in module.__doc__
    if size != "minilm":
      assert config.model.name == f"roberta-{size}"
    for config.method in ("vera", "lora", "bitfit", "head", "full"):
      check_settings(config)
  assert module.get_config().to_json() == module.get_config("base").to_json()
  with pytest.raises(ValueError, match="'huge', only base, large, minilm"):
    module.get_config("huge")


@pytest.mark.parametrize(
  "chosen",
  [
    *(("text", size) for size in ("minilm", "base", "large")),
    *(("images.cifar10", base) for base in ("dinov2", "efficientnet_lite0")),
    *(("images.cifar10", size) for size in ("base", "large")),
    *(("language",), ("e2e_texts",), ("quickstart",)),
  ],
)
def test_every_other_config_builds(chosen):
  config = load(*chosen)
  for config.method in ("vera", "lora", "bitfit", "full"):
    check_settings(config)


@pytest.mark.parametrize("name", ["cola", "mnli", "stsb", "minilm"])
def test_one_step_of_each_kind(name, tiny_config):
  """Two labels, three labels and pairs, a score, a config with variants.

  Traced on the first batch; whole runs, with their numbers, are in train/.
  """
  config = tiny_config(
    name, data__max_train_examples=4, optim__epochs=1, model__scan=True
  )
  setup = build_setup(config)
  step = setup.make_step(setup.shape)
  rates = {n: jnp.float32(rate) for n, rate in rates_of(config).items()}
  _, (batch,) = next(setup.data.train_batches(seeds=0, start_step=0))
  placed, key = setup.put_batch(batch), jax.random.key(config.seed)
  lowered = step.lower_whole(setup.frozen, placed, key, rates)
  state, metrics = lowered.out_info
  assert setup.steps == 1 and metrics["loss"].shape == ()
  for before, after in zip(
    *map(jax.tree.leaves, (setup.shape, state)), strict=True
  ):
    assert (after.shape, after.dtype) == (before.shape, before.dtype)


@pytest.mark.parametrize("size, rate", [("medium", 1e-1), ("large", 2e-2)])
def test_the_papers_settings_on_e2e(size, rate):
  """Table 10, and what microsoft/LoRA's examples/NLG has beside it."""
  config = load("e2e", size)
  optim, vera, lora = config.optim, config.vera, config.lora
  assert config.model.name == f"gpt2-{size}"
  assert (vera.rank, vera.lr, vera.d_init) == (1024, rate, 0.1)
  assert (lora.rank, lora.alpha, lora.lr) == (4, 32, 2e-4)
  assert (optim.epochs, optim.batch_size, optim.eps) == (5, 8, 1e-6)
  assert (optim.label_smoothing, optim.weight_decay) == (0.1, 0.01)
  assert config.generate.to_dict() == {
    "beams": 10,
    "length_penalty": 0.8,
    "no_repeat_ngram": 4,
    "rules": "lora",
    "max_new_tokens": 64,
    "rows": 16,
  }
  # the learning rate rises for 500 steps
  rates = schedule(1.0, steps=26_290, warmup_ratio=optim.warmup_ratio)
  assert rates(499) < rates(500) == 1.0 > rates(501)
  for config.method in ("vera", "lora", "bitfit", "full"):
    check_settings(config)
  text = importlib.import_module("configs.e2e").__doc__
  assert f"python -m experiments.e2e --config=configs/e2e.py:{size}" in text


# By the variants of configs/instruct.py: width, feed-forward, layers, query and
# key heads; and the paper's counts (Table 4), those of VeRA exactly, for LoRA's
# in millions.
LLAMAS = {
  "llama_7b": (4096, 11008, 32, 32, 32, 1_589_248, 159.9),
  "llama2_7b": (4096, 11008, 32, 32, 32, 1_589_248, 159.9),
  "llama_13b": (5120, 13824, 40, 40, 40, 2_416_640, 250.3),
  "llama2_13b": (5120, 13824, 40, 40, 40, 2_416_640, 250.3),
  "smollm2": (576, 1536, 30, 9, 3, 209_280, None),
  "llama3_8b": (4096, 14336, 32, 32, 8, None, None),
  "llama3_70b": (8192, 28672, 80, 64, 8, None, None),
  "llama3_405b": (16384, 53248, 126, 128, 8, None, None),
  "qwen3_32b": (5120, 25600, 64, 64, 8, None, None),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_the_papers_settings_and_counts_on_instructions(name):
  """Table 9, on all linear layers but the head."""
  width, inner, layers, heads, key_heads, vera, lora = LLAMAS[name]
  config = load("instruct", name)
  optim = config.optim
  assert (optim.epochs, optim.warmup_ratio, optim.schedule) == (
    1,
    0.1,
    "cosine",
  )
  if name != "smollm2":
    assert (optim.batch_size, optim.microbatch_rows) == (16, 4)
    assert (config.vera.rank, config.vera.lr) == (1024, 4e-3)
    assert (config.lora.rank, config.lora.lr) == (64, 4e-4)
    assert config.data.source == "yahma/alpaca-cleaned"
  fields = {
    "model_type": "llama",
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": key_heads,
    "intermediate_size": inner,
  }

  def count(method):
    plan = blueprint(
      fields,
      head="language_modelling",
      outputs=0,
      method=method,
      settings=settings_in(config, method),
    )
    own, _ = plan.own_shapes()
    return sum(leaf.size for leaf in jax.tree.leaves(own))

  if vera is not None:
    assert count("vera") == vera
  if lora is not None:
    assert round(count("lora") / 1e6, 1) == lora
  for config.method in METHODS:
    check_settings(config)
  text = importlib.import_module("configs.instruct").__doc__
  assert (
    f"python -m experiments.instruct --config=configs/instruct.py:{name}"
    in text
  )


# Table 11, by size and data set: of the head alone; full, VeRA and LoRA with
# the head's rate beside theirs.
TABLE_11 = {
  "base": {
    "cifar100": (4e-3, (4e-5, 4e-3), (2e-2, 4e-3), (4e-3, 4e-3)),
    "food101": (4e-3, (4e-5, 4e-2), (4e-2, 4e-2), (4e-3, 4e-3)),
    "flowers102": (4e-3, (4e-5, 4e-3), (4e-2, 4e-3), (4e-3, 4e-3)),
    "resisc45": (4e-2, (8e-5, 4e-3), (7e-2, 5e-3), (4e-3, 4e-3)),
  },
  "large": {
    "cifar100": (4e-4, (4e-5, 4e-3), (4e-2, 2e-3), (4e-3, 4e-3)),
    "food101": (4e-3, (4e-5, 4e-3), (4e-2, 2e-3), (4e-3, 4e-3)),
    "flowers102": (4e-3, (4e-5, 8e-3), (4e-2, 2e-3), (4e-3, 4e-3)),
    "resisc45": (4e-3, (8e-5, 4e-3), (7e-2, 3e-3), (4e-3, 4e-4)),
  },
}
# ViT's fields: width, layers, heads, and the paper's count (Table 5).
VIT = {"base": (768, 12, 12, 24_576), "large": (1024, 24, 16, 61_440)}


@pytest.mark.parametrize("size", TABLE_11)
@pytest.mark.parametrize("name", TABLE_11["base"])
def test_the_papers_settings_for_images(name, size):
  module = importlib.import_module(f"configs.images.{name}")
  config = module.get_config(size)
  pairs = [(config[m].lr, config[m].head_lr) for m in ("full", "vera", "lora")]
  assert (config.head.head_lr, *pairs) == TABLE_11[size][name]
  optim, data = config.optim, config.data
  assert (optim.epochs, optim.weight_decay, data.shots) == (10, 0.01, 10)
  assert (config.vera.rank, config.lora.rank) == (256, 8)
  assert config.vera.targets == config.lora.targets == ("query", "value")
  assert f"vit-{size}-patch16-224-in21k" in config.model.name
  for config.method in METHODS:
    check_settings(config)
  variant = "" if size == "base" else f":{size}"
  command = f"experiments.images --config=configs/images/{name}.py{variant}\n"
  assert command in module.__doc__


@pytest.mark.parametrize("size", VIT)
def test_the_papers_counts_on_vit(size):
  width, layers, heads, count = VIT[size]
  config = load("images.cifar100", size)
  plan = blueprint(
    {
      "model_type": "vit",
      "hidden_size": width,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "intermediate_size": 4 * width,
    },
    outputs=100,
    method="vera",
    settings=settings_in(config, "vera"),
  )
  own, _ = plan.own_shapes()
  assert sum(leaf.size for leaf in jax.tree.leaves(own)) == count


LLAMA = {
  "model_type": "llama",
  "vocab_size": 11,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 32,
  "max_position_embeddings": 32,
  "rms_norm_eps": 1e-6,
}
GPT2 = {
  "model_type": "gpt2",
  "vocab_size": 11,
  "n_embd": 16,
  "n_layer": 2,
  "n_head": 2,
  "n_positions": 32,
}


@pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_every_method_finds_a_decoders_layers(fields):
  config = load("language")
  for method, line in METHODS.items():
    made = blueprint(
      fields,
      outputs=0,
      head="language_modelling",
      method=method,
      settings=settings_in(config, method),
    )
    own, _ = made.own_shapes()
    assert bool(jax.tree.leaves(own)) == line.on_sites, method
