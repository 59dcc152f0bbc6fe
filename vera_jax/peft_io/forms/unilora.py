"""PEFT's Uni-LoRA: one trained vector, and a seed that shares it out."""

from vera_jax.errors import UserError
from vera_jax.peft_io.forms.form import (
  Exported,
  Fields,
  Form,
  Ours,
  Settings,
  count,
  number,
)


def settings(fields: Fields) -> tuple[str, Settings]:
  """Our method and its settings, by PEFT's adapter_config.json."""
  if fields.get("save_indices"):
    raise UserError(
      "save_indices=True: indices are made from proj_seed here, as PEFT makes"
      " them. Set save_indices=False in PEFT's config and save it again."
    )
  return "unilora", {
    "rank": count(fields, "r", 4),
    "size": count(fields, "theta_d_length", 256),
    "theta_init": number(fields, "init_theta_d_bound", 0.02),
    "projection_seed": int(fields.get("proj_seed", 42)),
  }


def write(ours: Ours) -> Exported:
  """Our adapter as PEFT's Uni-LoRA."""
  fields = {
    "r": ours.settings["rank"],
    "bias": "none",
    "theta_d_length": ours.settings["size"],
    "init_theta_d_bound": ours.settings["theta_init"],
    "proj_seed": ours.settings["projection_seed"],
    "unilora_dropout": 0.0,
    "save_indices": False,
  }
  return Exported(ours.leaves, fields, ours.root)


UNILORA = Form(
  endings={},
  root={"base_model.unilora_theta_d": "unilora_theta"},
  trained_root=True,
  fields=frozenset(
    {
      "init_theta_d_bound",
      "proj_seed",
      "save_indices",
      "theta_d_length",
      "unilora_dropout",
    }
  ),
  settings=settings,
  write=write,
)
