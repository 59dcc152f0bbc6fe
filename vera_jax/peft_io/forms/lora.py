"""PEFT's LoRA, with DoRA (use_dora) and the rank-stabilised scale.

Every method whose delta has a low rank is LoRA of that rank, exactly: VeRA by
B' = diag(b) B and A' = diag(d) A at scale 1, of A the columns and of B the rows
that a layer uses. Of a rank beyond a layer's widths the smaller one remains
(`products.exact_factors`). So is DVoRA, for which PEFT has no method, LoRA with
`use_dora`. The other way round there is no such identity.
"""

from collections.abc import Mapping

import numpy as np

from vera_jax.adapters.lora import SCALES
from vera_jax.adapters.products import exact_factors
from vera_jax.errors import UserError
from vera_jax.peft_io.forms.form import (
  MERGE,
  Exported,
  Fields,
  Form,
  Ours,
  Settings,
  count,
  number,
)
from vera_jax.peft_io.fused import join_lora, joined
from vera_jax.peft_io.tensors import Tensors

# These initialisations leave the base's own weights as they are.
INITS = (True, False, "gaussian", "eva", "orthogonal")


def settings(fields: Fields) -> tuple[str, Settings]:
  """Our method and its settings, by PEFT's adapter_config.json."""
  if fields.get("init_lora_weights", True) not in INITS:
    raise UserError(
      f"init_lora_weights={fields['init_lora_weights']!r}: it changed the"
      " base's weights. Convert the adapter in PEFT (save_pretrained's"
      " path_initial_model_for_weight_conversion) first."
    )
  for name, all_layers in (
    ("rank_pattern", "r"),
    ("alpha_pattern", "lora_alpha"),
  ):
    values = (fields.get(name) or {}).values()
    if any(value != fields.get(all_layers, 8) for value in values):
      raise UserError(
        f"{name}={fields[name]!r}: all layers share one value here; {MERGE}."
      )
  return "dora" if fields.get("use_dora") else "lora", {
    "rank": count(fields, "r", 8),
    "alpha": number(fields, "lora_alpha", 8),
    "scaling": "root" if fields.get("use_rslora") else "rank",
  }


def write(ours: Ours) -> Exported:
  """Our adapter as PEFT's LoRA or DoRA."""
  own_matrices = ours.method in ("lora", "dora")
  leaves: dict[str, Tensors] = {}
  for module, tensors in ours.leaves.items():
    if own_matrices:
      leaves[module] = tensors
      continue
    down, up = map(np.asarray, exact_factors(ours.low_rank(module)))
    leaves[module] = {"lora_A": down.T, "lora_B": up.T}
    if "magnitude_m" in tensors:
      leaves[module]["magnitude_m"] = tensors["magnitude_m"]
  rank = max(len(tensors["lora_A"]) for tensors in leaves.values())
  leaves = {name: _padded(tensors, rank) for name, tensors in leaves.items()}
  fields = {"r": rank, "bias": "none", "lora_alpha": rank}  # scale 1
  if own_matrices:
    fields["lora_alpha"] = ours.settings["alpha"]
    fields["use_rslora"] = ours.settings.get("scaling") == "root"
  if ours.adapter.links:
    fields["use_dora"] = True
  return Exported(leaves, fields)


def join(ours: Ours, exported: Exported) -> Exported:
  """One adapter for all parts of a layer, at the ranks' sum."""
  together = joined(exported.leaves, ours.layers)
  most = max(len(parts) for parts in together.values())
  fields, rank = exported.fields, exported.fields["r"]
  scaling = "root" if fields.pop("use_rslora", False) else "rank"
  scale = fields["lora_alpha"] / SCALES[scaling](rank)
  return Exported(
    {
      whose: join_lora(ours.layers[whose], parts, rank=rank * most)
      for whose, parts in together.items()
    },
    {**fields, "r": rank * most, "lora_alpha": scale * rank * most},
  )


def _padded(tensors: Tensors, rank: int) -> Tensors:
  """A and B with zeros up to a rank, for PEFT has one r for all modules."""
  A, B = tensors["lora_A"], tensors["lora_B"]
  more = rank - len(A)
  return tensors | {
    "lora_A": np.pad(A, [(0, more), (0, 0)]),
    "lora_B": np.pad(B, [(0, 0), (0, more)]),
  }


def limited(
  exported: Exported, *, truncate: int | None, max_rank: int | None
) -> tuple[Exported, float]:
  """LoRA for a server that takes no higher rank than one.

  Args:
    exported: at its own rank.
    truncate: the rank that it is cut to if it has more; None for none.
    max_rank: the rank that the server takes at most; None for any.

  Returns:
    The nearest adapter of that rank, and how much of a module's change of
    weights is lost at most, as a share of its norm.

  Raises:
    UserError: the rank is beyond `max_rank`, or DoRA's would be cut.
  """
  fields, lost = exported.fields, 0.0
  if truncate is not None and truncate < fields["r"]:
    if fields.get("use_dora"):
      raise UserError(
        "DoRA's magnitudes belong to its weights as they are, so its rank is"
        " not cut: leave --truncate out, or merge the adapter."
      )
    scaling = SCALES["root" if fields.get("use_rslora") else "rank"]
    alpha = fields["lora_alpha"] / scaling(fields["r"]) * truncate
    fields = fields | {"r": truncate, "lora_alpha": alpha, "use_rslora": False}
    leaves, lost = truncated(exported.leaves, truncate)
    exported = Exported(leaves, fields)
  if max_rank is not None and fields["r"] > max_rank:
    raise UserError(
      f"As LoRA the adapter has rank {fields['r']}, more than"
      f" --max_rank={max_rank}. --truncate={max_rank} writes the nearest"
      " adapter of that rank, and says what is lost; or merge it."
    )
  return exported, lost


def truncated(
  leaves: Mapping[str, Tensors], rank: int
) -> tuple[dict[str, Tensors], float]:
  """The nearest matrices of a lower rank, and what is lost as in `limited`."""
  nearest: dict[str, Tensors] = {}
  lost = 0.0
  for module, tensors in leaves.items():
    # B A = Q (R S') P' with orthonormal Q and P: R S' has its singular values
    left, small_left = np.linalg.qr(tensors["lora_B"].astype(np.float64))
    right, small_right = np.linalg.qr(tensors["lora_A"].T.astype(np.float64))
    U, values, V = np.linalg.svd(small_left @ small_right.T)
    roots = np.sqrt(values[:rank])
    A = roots[:, None] * (V[: len(roots)] @ right.T)
    B = left @ U[:, : len(roots)] * roots
    pair = {"lora_A": A.astype(np.float32), "lora_B": B.astype(np.float32)}
    nearest[module] = _padded(pair, rank)
    if norm := float(np.linalg.norm(values)):
      lost = max(lost, float(np.linalg.norm(values[rank:])) / norm)
  return nearest, lost


LORA = Form(
  endings={
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "magnitude_m",  # no ".weight"
  },
  fields=frozenset(
    {
      "alpha_pattern",
      "init_lora_weights",
      "lora_alpha",
      "lora_dropout",
      "qalora_group_size",
      "rank_pattern",
      "use_dora",
      "use_rslora",
    }
  ),
  settings=settings,
  write=write,
  join=join,
)
