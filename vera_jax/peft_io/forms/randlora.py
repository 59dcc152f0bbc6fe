"""PEFT's RandLoRA: two matrices of scales per layer, random bases for all.

PEFT repeats the bases under every layer's name; they are written once here,
which it reads as well.
"""

from vera_jax.errors import UserError
from vera_jax.peft_io.forms.form import (
  Exported,
  Fields,
  Form,
  Ours,
  Settings,
  count,
  number,
  seed,
)


def settings(fields: Fields) -> tuple[str, Settings]:
  """Our method and its settings, by PEFT's adapter_config.json."""
  for name in ("sparse", "very_sparse"):
    if fields.get(name) and not fields.get("save_projection", True):
      raise UserError(
        f"{name}=True: such bases are not drawn here. Save the adapter with"
        " save_projection=True, which stores them."
      )
  return "randlora", {
    "rank": count(fields, "r", 32),
    "alpha": number(fields, "randlora_alpha", 640),
    "init": "peft",
    "projection_seed": seed(fields, "projection_prng_key"),
  }


def write(ours: Ours) -> Exported:
  """Our adapter as PEFT's RandLoRA."""
  rank = ours.settings["rank"]
  A, B = (ours.projections[name] for name in "AB")
  fields = {
    "r": rank,
    "bias": "none",
    "randlora_alpha": ours.settings["alpha"],
    "randlora_dropout": 0.0,
    "projection_prng_key": ours.key(),
    "save_projection": True,
  }
  root = {"A": A[:, None], "B": B.reshape(len(B), -1, rank)}
  return Exported(ours.leaves, fields, root)


RANDLORA = Form(
  endings={
    "randlora_lambda": "randlora_lambda",
    "randlora_gamma": "randlora_gamma",
  },
  root={"base_model.randlora_A": "A", "base_model.randlora_B": "B"},
  dropped=("randlora_A", "randlora_B"),
  fields=frozenset(
    {
      "projection_prng_key",
      "randlora_alpha",
      "randlora_dropout",
      "save_projection",
      "sparse",
      "very_sparse",
    }
  ),
  settings=settings,
  write=write,
)
