"""Where an adapter comes from: its base; a seed, or the file, for A and B."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vera_jax.adapters.files import STORED
from vera_jax.adapters.projections import INITIALISERS, digest, make_pair
from vera_jax.errors import UserError
from vera_jax.models.hf_weights import fingerprint
from vera_jax.peft_io.config import PeftSettings


def check_base(about: Mapping[str, Any], base: Path) -> None:
  """Refuses another base than adapter.json's; PEFT's own files name none."""
  if about.get("base_fingerprint") not in (None, fingerprint(base)):
    raise UserError(
      f"{base} is not the base that the adapter was trained on: its weights"
      " have another fingerprint. Give the right one by --base=FOLDER."
    )


class Origin(NamedTuple):
  """The seed and initialiser; `pair` is kept where no seed gives it."""

  init: str
  seed: int
  digest: str
  pair: dict[str, np.ndarray]


def find_origin(
  settings: PeftSettings,
  pair: Mapping[str, np.ndarray],
  *,
  inputs: int,
  outputs: int,
  ours: Mapping[str, Any],
) -> Origin:
  """The seed that gives the saved pair, PEFT's key without one, or the pair.

  Args:
    settings: of the adapter.
    pair: A and B as saved; empty where they were not.
    inputs: of the widest adapted layer.
    outputs: of the widest adapted layer.
    ours: the settings that our own export wrote into the file, if it is one.
  """
  seeds = [("peft", settings.key)]
  init, seed = ours.get("init"), ours.get("projection_seed")
  if init in INITIALISERS and isinstance(seed, int):
    seeds.insert(0, (str(init), seed))
  if not settings.saved and not pair:
    seeds = seeds[-1:]
    saved = None
  else:
    saved = _saved_pair(settings, pair, (inputs, outputs))
  for init, seed in seeds:
    made = make_pair(settings.rank, inputs, outputs, init=init, seed=seed)
    if saved is None or all(np.array_equal(saved[k], made[k]) for k in "AB"):
      return Origin(init, seed, digest(made), {})
  assert saved is not None
  return Origin(STORED, settings.key, digest(saved), saved)


def _saved_pair(
  settings: PeftSettings, pair: Mapping[str, np.ndarray], size: tuple[int, int]
) -> dict[str, np.ndarray]:
  """The saved A and B, cut to the layers' widths."""
  if set(pair) != {"A", "B"}:
    raise UserError(
      "save_projection is true, but the file lacks base_model.vera_A or"
      " base_model.vera_B: it is cut off, or save_projection must be false."
    )
  A, B = pair["A"][:, : size[0]], pair["B"][: size[1]]
  need = {"A": (settings.rank, size[0]), "B": (size[1], settings.rank)}
  if A.shape != need["A"] or B.shape != need["B"]:
    raise UserError(
      f"vera_A and vera_B have shapes {pair['A'].shape}, {pair['B'].shape};"
      f" the layers and r need {need['A']}, {need['B']}."
    )
  return {"A": np.ascontiguousarray(A), "B": np.ascontiguousarray(B)}
