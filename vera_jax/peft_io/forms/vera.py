"""PEFT's VeRA and PVeRA: two vectors per layer, one random pair for all."""

import numpy as np

from vera_jax.adapters.projections import STRUCTURED
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
from vera_jax.peft_io.fused import join_pair, join_vera, joined


def settings(fields: Fields) -> tuple[str, Settings]:
  """Our method and its settings, by PEFT's adapter_config.json."""
  method = str(fields["peft_type"]).lower()
  of_vera = {}
  if method == "vera":
    of_vera = {"sharing": "shared", "train": "both", "conv": "whole"}
  return method, {
    "rank": count(fields, "r", 256),
    "d_init": number(fields, "d_initial", 0.1),
    **of_vera,
    "init": "peft",
    "projection_seed": seed(fields, "projection_prng_key"),
  }


def check_stored(ours: Ours) -> None:
  """PEFT has A and B as matrices; a structured pair is none."""
  if ours.settings.get("init") == STRUCTURED:
    raise UserError(
      "This adapter's pair is structured: it is applied to vectors, and PEFT's"
      f" {ours.method} has no place for it. As LoRA of the same rank it is"
      " exact: --as=lora."
    )


def write_vera(ours: Ours) -> Exported:
  """Our adapter as PEFT's VeRA."""
  check_stored(ours)
  if set(ours.projections) != {"A", "B"}:
    raise UserError(
      "Each layer of this adapter has projections of its own (sharing=unique),"
      " for which PEFT's VeRA has no place: --as=lora."
    )
  leaves = {}
  for module in ours.leaves:
    factors, target = ours.low_rank(module), ours.layers[module].target
    # PEFT has both vectors; the one that was not trained is written out.
    d = np.broadcast_to(np.asarray(factors.inner), factors.down.shape[-1])
    b = np.ones(target.outputs, np.float32)
    b = b if factors.outer is None else np.asarray(factors.outer)
    leaves[module] = {"vera_d": d, "vera_b": b}
  rank = len(ours.projections["A"])
  fields = {"r": rank, "bias": "none", "vera_dropout": 0.0}
  fields["d_initial"] = ours.settings.get("d_init", 1.0)
  fields["projection_prng_key"] = ours.key()
  return Exported(
    leaves, {**fields, "save_projection": True}, dict(ours.projections)
  )


def write_pvera(ours: Ours) -> Exported:
  """Our adapter as PEFT's PVeRA."""
  check_stored(ours)
  fields = {
    "r": ours.settings["rank"],
    "bias": "none",
    "pvera_dropout": 0.0,
    "d_initial": ours.settings["d_init"],
    "projection_prng_key": ours.key(),
    "save_projection": True,
    "sample_at_inference": False,
  }
  return Exported(ours.leaves, fields, dict(ours.projections))


def join(ours: Ours, exported: Exported) -> Exported:
  """One adapter for all parts of a layer, at the ranks' sum."""
  together = joined(exported.leaves, ours.layers)
  places = {
    tuple((part, ours.layers[whose].parts.get(part)) for part in parts)
    for whose, parts in together.items()
  }
  if len(places) > 1 or "" in dict(*places):
    raise UserError(
      "The adapter has parts of fused layers beside other layers, for which"
      " PEFT's VeRA has no common A and B: --as=lora."
    )
  whose, parts = next(iter(together.items()))
  pair = join_pair(ours.layers[whose], parts, exported.root)
  return Exported(
    {
      whose: join_vera(ours.layers[whose], parts)
      for whose, parts in together.items()
    },
    {**exported.fields, "r": len(pair["A"])},
    pair,
  )


KEYED = {"d_initial", "projection_prng_key", "save_projection"}
VERA = Form(
  endings={"vera_lambda_d": "vera_d", "vera_lambda_b": "vera_b"},
  root={"base_model.vera_A": "A", "base_model.vera_B": "B"},
  fields=frozenset({*KEYED, "vera_dropout"}),
  settings=settings,
  write=write_vera,
  unchanged=lambda settings: {"vera_d": settings["d_init"]},
  join=join,
)
PVERA = Form(
  endings={"pvera_lambda_d": "pvera_d", "pvera_lambda_b": "pvera_b"},
  root={"base_model.pvera_A": "A", "base_model.pvera_B": "B"},
  fields=frozenset({*KEYED, "pvera_dropout", "generator_seed"}),
  settings=settings,
  write=write_pvera,
  unchanged=lambda settings: {"pvera_d": settings["d_init"]},
)
