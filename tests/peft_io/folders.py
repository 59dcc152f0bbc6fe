"""PEFT's adapter folders for the tiny model, written without PEFT."""

import json

import numpy as np
from safetensors.numpy import save_file

from vera_jax.adapters.projections import make_pair

MODULE = "base_model.model.bert.encoder.layer.{}.{}.{}"
QUERY, WIDE = "attention.self.query", "intermediate.dense"
WIDTHS = {QUERY: (16, 16), WIDE: (16, 32)}  # in, out of the tiny model
TARGETS = ["query", "intermediate/dense"]  # the same layers by our patterns
RANK, KEY = 4, 7
COMMON = {
  "task_type": "SEQ_CLS",
  "r": RANK,
  "target_modules": ["query", WIDE],
  "modules_to_save": ["classifier", "score"],
}
VERA = {
  **COMMON,
  "peft_type": "VERA",
  "projection_prng_key": KEY,
  "save_projection": True,
  "d_initial": 0.1,
  "bias": "none",
  "peft_version": "0.21.2",
}
LORA = {
  **COMMON,
  "peft_type": "LORA",
  "lora_alpha": 6,
  "megatron_core": "megatron.core",
  "qalora_group_size": 16,
  "rank_pattern": {},
  "alpha_pattern": {},
  "loftq_config": {},
}
HEAD = (
  "base_model.model.classifier.weight",
  "base_model.model.classifier.bias",
)


def noise(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return rng.standard_normal(shape).astype(np.float32)


def head():
  return {HEAD[0]: noise(2, 16), HEAD[1]: noise(2)}


def vectors(layers=(0, 1)):
  """VeRA's d and b of some layers, and the head."""
  tensors = head()
  for layer in layers:
    for kind, (_, outputs) in WIDTHS.items():
      name = MODULE.format(layer, kind, "vera_lambda_")
      tensors[f"{name}d"] = noise(RANK, seed=layer)
      tensors[f"{name}b"] = noise(outputs, seed=layer)
  return tensors


def pair(seed=KEY, init="peft", inputs=16, outputs=32):
  """VeRA's A and B."""
  made = make_pair(RANK, inputs, outputs, seed=seed, init=init)
  return {f"base_model.vera_{k}": np.asarray(made[k]) for k in "AB"}


def matrices():
  """LoRA's A and B of both layers, and the head."""
  tensors = head()
  for layer in (0, 1):
    for kind, (inputs, outputs) in WIDTHS.items():
      name = MODULE.format(layer, kind, "lora_")
      tensors[f"{name}A.weight"] = noise(RANK, inputs, seed=layer)
      tensors[f"{name}B.weight"] = noise(outputs, RANK, seed=layer)
  return tensors


def write(folder, tensors, config, **changes):
  """PEFT's two files."""
  folder.mkdir()
  save_file(tensors, folder / "adapter_model.safetensors")
  (folder / "adapter_config.json").write_text(json.dumps(config | changes))
  return folder
