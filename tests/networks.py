"""Small random networks that are no Transformers, in folders of their own."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from experiments.convert_char_lstm import write_tokenizer
from tests.pictures import PREPROCESSOR
from vera_jax.models.hf_weights import to_hf
from vera_jax.pretrained.blueprint import blueprint

STAGE = {"layers": 1, "kernel": 3, "stride": 1, "expand": 1, "width": 4}
LITE = {
  "model_type": "efficientnet_lite",
  "stem_width": 4,
  "stages": [
    STAGE,
    STAGE | {"layers": 2, "kernel": 5, "stride": 2, "expand": 2, "width": 6},
  ],
  "last_width": 12,
  "image_size": 8,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,[]|'£-5"
LSTM = {
  "model_type": "char_lstm",
  "vocab_size": len(LETTERS) + 2,
  "embedding_size": 5,
  "hidden_size": 4,
  "num_hidden_layers": 2,
  "window": 6,
}


def random_params(plan, scale=0.3):
  """Every leaf random; variances and scales are near 1."""
  rng = np.random.default_rng(0)
  made = {}
  for path, leaf in plan.shapes.items():
    near = float(path[-1] in ("scale", "var"))
    drawn = scale * rng.standard_normal(leaf.shape)
    value = near + (np.abs(drawn) if path[-1] == "var" else drawn)
    made[path] = jnp.asarray(value, leaf.dtype)
  return unflatten_dict(made)


def write_lite(folder: Path) -> Path:
  """A pretrained EfficientNet-Lite without a head."""
  plan = blueprint(LITE, outputs=2)
  params = random_params(plan)
  del params["classifier"]
  return _write(folder, params, plan, LITE, PREPROCESSOR)


def write_lstm(folder: Path) -> Path:
  """A pretrained character model and its tokenizer."""
  plan = blueprint(LSTM, outputs=0, head="language_modelling")
  _write(folder, random_params(plan), plan, LSTM, None)
  numbers = {letter: i for i, letter in enumerate(LETTERS, 1)}
  write_tokenizer(folder, {**numbers, "<s>": len(numbers) + 1})
  return folder


def _write(folder, params, plan, fields, preprocessor):
  folder.mkdir(parents=True, exist_ok=True)
  save_file(to_hf(params, plan.config), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(fields))
  if preprocessor:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(preprocessor))
  return folder


def paths_of(tree) -> set[str]:
  return {"/".join(path) for path in flatten_dict(tree)}
