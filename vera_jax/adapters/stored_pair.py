"""A pair A, B that no seed gives, and that lies in an adapter's file.

PEFT's older files have such a pair, and so has what was trained with
`init=stored`: its pair is that of another adapter, `vera.pair`, which trained
it (`tied_lora.py`) or holds it in its file.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vera_jax.adapters.files import SavedAdapter, load_adapter
from vera_jax.adapters.interface import Adapter, Path, Site, Target
from vera_jax.adapters.projections import STORED, Pair
from vera_jax.errors import UserError


def read_pair(
  folder: str, sites: Mapping[Path, Target | Site], *, rank: int
) -> Pair:
  """A and B of another adapter, for layers of a network.

  Args:
    folder: of the adapter, or its id on the hub.
    sites: the layers.
    rank: r, which A and B must have.

  Raises:
    UserError: no folder is named, its adapter has no such pair, or the pair has
      another rank, or is too narrow for one of the layers.
  """
  if not folder:
    raise UserError(
      "init is 'stored', so the pair comes from an adapter: name its folder,"
      " as pair."
    )
  saved = load_adapter(folder)
  names = [(f"projections.{k}", f"tied_lora_{k}") for k in "AB"]
  held = [[name for name in two if name in saved.tensors] for two in names]
  if not all(held):
    settings = saved.about["settings"]
    seed = settings.get("projection_seed")
    advice = f" Take it by projection_seed={seed}." if seed is not None else ""
    raise UserError(
      f"{saved.folder} has no pair A, B in its file, but those of tied_lora and"
      f" of init=stored have: it is of the method {saved.about['method']}."
      + advice
    )
  A, B = (jnp.asarray(saved.tensors[name], jnp.float32) for name, *_ in held)
  if not len(A) == B.shape[1] == rank:
    raise UserError(
      f"The rank is {rank}, but the pair in {saved.folder} has {len(A)}: set"
      f" rank to {len(A)}."
    )
  for path, site in sites.items():
    if site.inputs > A.shape[1] or site.outputs > len(B):
      raise UserError(
        f"The pair in {saved.folder} is for layers of up to {A.shape[1]} inputs"
        f" and {len(B)} outputs; {'/'.join(path)} has {site.inputs} and"
        f" {site.outputs}. Leave it out of the targets, or take another pair."
      )
  return {"A": A, "B": B}


def is_stored(about: Mapping[str, Any]) -> bool:
  """Whether no seed gives the pair A, B, so that it lies in the file."""
  return any(group.get("init") == STORED for group in groups(about["settings"]))


def in_file(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that an adapter's file keeps: it holds the pair itself, and
  so not the folder that this is from."""
  return {
    name: in_file(value) if isinstance(value, Mapping) else value
    for name, value in settings.items()
    if name != "pair"
  }


def groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The settings, and those of each link of a chain."""
  links = [x for x in settings.values() if isinstance(x, Mapping)]
  return [settings, *links]


def take_stored(
  saved: SavedAdapter, adapter: Adapter
) -> tuple[SavedAdapter, Adapter]:
  """A pair that lies in the file moves from the tensors to the adapter."""
  if not is_stored(saved.about):
    return saved, adapter
  rest = dict(saved.tensors)
  try:
    pair = {k: jnp.asarray(rest.pop(f"projections.{k}")) for k in "AB"}
  except KeyError as error:
    raise UserError(
      f"The adapter {saved.folder} has stored projections by its adapter.json,"
      f" but its tensors lack {error}."
    ) from error
  stored = adapter._replace(shared=lambda sites: pair)
  return saved._replace(tensors=rest), stored
