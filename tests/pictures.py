"""Small pictures in class folders, and a small random ViT that reads them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from PIL import Image
from safetensors.numpy import save_file

from vera_jax.models.hf_weights import to_hf
from vera_jax.pretrained.blueprint import blueprint

COLOURS = {"blue": (40, 40, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
VIT = {
  "model_type": "vit",
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "image_size": 8,
  "patch_size": 4,
}
PREPROCESSOR = {
  "do_center_crop": False,
  "size": {"height": 8, "width": 8},
  "resample": 2,
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
}


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
  """One colour under noise, 10 x 12 pixels."""
  noise = np.random.default_rng(seed).normal(0, 30, (10, 12, 3))
  pixels = np.clip(np.array(colour) + noise, 0, 255)
  return Image.fromarray(pixels.astype(np.uint8))


def write_classes(folder: Path, *, each: int, seed: int) -> None:
  """A folder per colour with so many pictures."""
  for number, (name, colour) in enumerate(COLOURS.items()):
    (folder / name).mkdir(parents=True)
    for i in range(each):
      made = picture(colour, seed + 100 * number + i)
      made.save(folder / name / f"{i}.png")


def write_vit(folder: Path, **fields: object) -> Path:
  """A pretrained network's folder, random and without a head."""
  known = {**VIT, **fields}
  plan = blueprint(known, outputs=2, scan=False)
  rng = np.random.default_rng(0)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(
      0.2 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale"),
      leaf.dtype,
    ),
    unflatten_dict(plan.shapes),
  )
  tensors = to_hf(params, plan.config)
  base = {k: v for k, v in tensors.items() if not k.startswith("classifier")}
  folder.mkdir(parents=True, exist_ok=True)
  save_file(base, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(known))
  (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
  return folder
