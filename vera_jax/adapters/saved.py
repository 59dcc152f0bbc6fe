"""A saved adapter's tensors back on a model.

Whatever is not what the adapter was trained with is refused by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vera_jax.adapters.files import (
  SavedAdapter,
  is_stacked,
  named_slices,
)
from vera_jax.adapters.interface import Adapter, Target
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.projections import PRNG, STORED, digest
from vera_jax.adapters.sites import first_leaves, make_shared
from vera_jax.errors import UserError

if TYPE_CHECKING:
  pass

Flat = dict[TreePath, Any]
SHOWN = 3  # differences of one kind that a message lists


def own_shapes(
  adapter: Adapter, targets: Mapping[TreePath, Target], base: Mapping[str, Any]
) -> tuple[Any, Any]:
  """The shapes of the adapter's leaves and of the projections."""

  def build(base: Any) -> Any:
    projections = make_shared(adapter, targets, base)
    key = jax.random.key(0)
    return first_leaves(adapter, targets, base, projections, key), projections

  return jax.eval_shape(build, base)


def is_held(saved: SavedAdapter, path: TreePath, leaf: Any) -> bool:
  """Whether the file has a leaf of the base, or one of its layers."""
  return any(name in saved.tensors for name, _ in named_slices(path, leaf))


def read_leaves(saved: SavedAdapter, trained: Flat) -> Flat:
  """The file's tensors as the trained leaves, of which the shapes are given.

  Raises:
    UserError: naming what lacks, is too much, or has another shape.
  """
  wrong = list(differences(saved.tensors, trained))
  if wrong:
    raise UserError(
      f"The adapter {saved.folder} does not fit the model:\n  "
      + "\n  ".join(wrong)
    )
  return leaves_by_path(saved.tensors, trained)


def differences(
  found: Mapping[str, np.ndarray], trained: Flat
) -> Iterator[str]:
  """What lacks, what is too much and what has another shape, in words."""
  expected = {
    name: leaf.shape[1:] if is_stacked(path, leaf) else leaf.shape
    for path, leaf in trained.items()
    for name, _ in named_slices(path, leaf)
  }
  lacking = [name for name in expected if name not in found]
  beyond = [name for name in found if name not in expected]
  if lacking:
    yield f"no {some(lacking)} in the file"
  if beyond:
    yield f"no place for {some(beyond)}: are targets and method right?"
  unequal = [
    f"{name} has shape {found[name].shape}, not {shape}"
    for name, shape in expected.items()
    if name in found and found[name].shape != shape
  ]
  if unequal:
    yield f"{some(unequal)}: are rank and labels right?"


def leaves_by_path(found: Mapping[str, np.ndarray], trained: Flat) -> Flat:
  """The file's tensors as float32 leaves, stacked where the tree is."""
  leaves = {}
  for path, leaf in trained.items():
    values = [found[name] for name, _ in named_slices(path, leaf)]
    value = np.stack(values) if is_stacked(path, leaf) else values[0]
    leaves[path] = value.astype(np.float32)
  return leaves


def is_stored(about: Mapping[str, Any]) -> bool:
  """Whether no seed gives the pair A, B, so that it lies in the file."""
  settings = about["settings"]
  groups = [x for x in settings.values() if isinstance(x, Mapping)]
  return any(group.get("init") == STORED for group in (settings, *groups))


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


def read_projections(
  saved: SavedAdapter,
  adapter: Adapter,
  targets: Mapping[TreePath, Target],
  params: Mapping[str, Any],
) -> dict[str, Any]:
  """The projections on these parameters; {} where the method has none.

  Raises:
    UserError: they are not those of training.
  """
  projections = make_shared(adapter, targets, params)
  if not projections:
    return {}
  prng, expected = (
    saved.about[f"projection_{name}"] for name in ("prng", "digest")
  )
  if prng != PRNG:
    raise UserError(
      f"The adapter {saved.folder} has its projections from the generator"
      f" {prng!r}; there is only {PRNG!r} here."
    )
  computed = digest(projections)
  if computed != expected:
    raise UserError(
      f"The projections of the adapter {saved.folder} come out different from"
      f" those it was trained with: digest {computed[:12]}, not"
      f" {str(expected)[:12]}. Either its seed, init or rank was changed, or"
      " this version of jax draws other numbers."
    )
  return projections


def some(names: Sequence[str]) -> str:
  """The first of these names, and how many more there are."""
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more
