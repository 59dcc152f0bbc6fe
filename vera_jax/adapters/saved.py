"""An adapter from a model to its folder, and from the folder onto a model.

`Adapted.save` and `Adapted.load` are these functions, for any linen model; a
run's adapter is put back on its base by the same ones (`pretrained/`). Whatever
is not what the adapter was trained with is refused by name.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax import results
from vera_jax.adapters.files import (
  SavedAdapter,
  is_stacked,
  load_adapter,
  named_slices,
  save_adapter,
)
from vera_jax.adapters.interface import Adapter, Target
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.labels import FROZEN, count, label_tree
from vera_jax.adapters.projections import PRNG, kept_digest
from vera_jax.adapters.sites import Fused, first_leaves, make_shared
from vera_jax.adapters.stored_pair import in_file, is_stored, take_stored
from vera_jax.errors import UserError
from vera_jax.operations.quantised import plain

Flat = dict[TreePath, Any]


@runtime_checkable
class Identified(Protocol):
  """What a model with an adapter on it says of the adapter."""

  @property
  def adapter(self) -> Adapter: ...

  @property
  def targets(self) -> tuple[str, ...]: ...

  @property
  def fused(self) -> Fused: ...


SHOWN = 3  # misfits of one kind that a message lists


def save(
  adapted: Identified,
  folder: str | Path,
  trainable: Mapping[str, Any],
  variables: Mapping[str, Any],
  about: Mapping[str, Any],
  *,
  base: tuple[str, str] | None = None,
) -> None:
  """What `Adapted.save` does.

  Args:
    adapted, folder, trainable, variables, about: as it has them.
    base: name and fingerprint of a folder, of which the caller knows that it
      holds these weights: then the file is one that commands read.
  """
  adapter, projections = adapted.adapter, variables.get("projections", {})
  params = meta.unbox(dict(variables["params"]))
  trained = meta.unbox(dict(trainable))
  flat, leaves = flatten_dict(params), flatten_dict(trained)
  brings = any(link.init or link.common for link in adapter.methods)
  without = not any(adapter.owns(path[-1]) for path in flat)
  if (brings and without) or (adapter.shared and not projections):
    raise UserError(
      f"The variables have no leaves of {adapter.name}, or no projections: give"
      " those that init or init_on returned."
    )
  for path, leaf in leaves.items():
    name = "/".join(path)
    if path not in flat or flat[path].shape != leaf.shape:
      raise UserError(
        f"The variables have no {name} of shape {leaf.shape}, as the trainable"
        " leaves do: give those that init or init_on returned."
      )
    if leaf.dtype != np.float32:
      raise UserError(
        f"{name} is trained in {leaf.dtype}, but an adapter's file holds"
        " float32: convert the trainable leaves."
      )
  labels = label_tree(params, adapter, head="", new=leaves)
  lacking = [
    "/".join(path)
    for path, label in flatten_dict(labels).items()
    if label != FROZEN and path not in leaves
  ]
  if lacking:
    raise UserError(
      f"The trainable leaves lack {some(lacking)}, which {adapter.name} trains:"
      " give the first of the two trees that split returned."
    )
  frozen = {path: leaf for path, leaf in flat.items() if path not in leaves}
  computed = {
    **identity(adapted),
    "base": base and base[0],
    "base_fingerprint": base[1] if base else fingerprint(frozen),
    "labels": [],
    "projection_prng": PRNG,
    "projection_digest": kept_digest(adapter, projections),
    "parameters": count(params, labels)._asdict(),
    "versions": results.provenance()["versions"],
  }
  if taken := sorted(computed.keys() & about.keys()):
    raise UserError(
      f"{some(taken)} can't be given in `about`: they are computed."
    )
  if is_stored(computed):
    trained = {**trained, "projections": projections}
  save_adapter(folder, trained, about={**about, **computed})


def load(
  adapted: Identified,
  folder: str | Path,
  variables: Mapping[str, Any],
  model: Callable[[], tuple[Mapping[TreePath, Target], Mapping[str, Any]]],
  *,
  base_fingerprint: str | None = None,
) -> dict[str, Any]:
  """What `Adapted.load` does.

  Args:
    adapted, folder, variables: as it has them.
    model: makes the adapter's sites and the shapes of the model's parameters.
    base_fingerprint: where the file names a base, that of the folder of which
      the caller knows that it holds the variables' weights.
  """
  saved, adapter = load_adapter(folder), adapted.adapter
  named = saved.about["base"]
  if named is not None and base_fingerprint is None:
    raise UserError(
      f"The adapter {saved.folder} belongs to the base {named!r}; use"
      " restore_adapter, which builds it."
    )
  # an adapter whose file names a base was made by that file
  ours = identity(adapted) if named is None else {}
  theirs = {name: saved.about.get(name, {}) for name in ours}
  # by names such as settings.rank
  ours, theirs = (flatten_dict(value, sep=".") for value in (ours, theirs))
  differing = [
    f"{name}: {theirs.get(name)!r} in the file, {ours.get(name)!r} here"
    for name in ours | theirs
    if ours.get(name) != theirs.get(name)
  ]
  if differing:
    raise UserError(
      f"The model is adapted otherwise than the adapter {saved.folder} was"
      " saved; give adapt the same:\n  " + "\n  ".join(differing)
    )
  saved, adapter = take_stored(saved, adapter)
  targets, shapes = model()
  boxed = flatten_dict(dict(shapes)) | flatten_dict(dict(variables["params"]))
  boxed = {p: leaf for p, leaf in boxed.items() if not adapter.owns(p[-1])}
  base = meta.unbox(boxed)
  trained = read_leaves(
    saved,
    flatten_dict(own_shapes(adapter, targets, meta.unbox(shapes))[0])
    | {p: leaf for p, leaf in base.items() if is_held(saved, p, leaf)},
  )
  frozen = {path: leaf for path, leaf in base.items() if path not in trained}
  lacking = [
    "/".join(path)
    for path, leaf in frozen.items()
    if isinstance(leaf, jax.ShapeDtypeStruct)
  ]
  if lacking:
    raise UserError(
      f"Neither the variables nor the adapter {saved.folder} have"
      f" {some(lacking)}: give the model's pretrained parameters, all of them."
    )
  expected = saved.about["base_fingerprint"]
  computed = base_fingerprint or fingerprint(frozen)
  if computed != expected:
    raise UserError(
      f"The adapter {saved.folder} was trained on other weights than these:"
      f" what it leaves frozen has the fingerprint {computed[:12]}, not"
      f" {expected[:12]}. Give the parameters that it was trained on, in the"
      " same type, with the layers of a stack on the same axis."
    )
  filled = base | jax.tree.map(jnp.asarray, trained)
  projections = read_projections(
    saved, adapter, targets, unflatten_dict(filled)
  )
  params = {
    path: meta.replace_boxed(boxed[path], leaf) if path in boxed else leaf
    for path, leaf in filled.items()
  }
  ours = {"projections": projections} if projections else {}
  return {**variables, "params": unflatten_dict(params), **ours}


def identity(adapted: Identified) -> dict[str, Any]:
  """What makes the adapter what it is, as adapter.json has it."""
  adapter = adapted.adapter
  # a chain of its own name, such as DoRA, is a method of the table
  parts = adapter.parts if not adapter.method else ()
  groups = {
    part.method or part.name: {
      **(vars(part.settings) if part.settings else {}),
      "targets": part.on or adapted.targets,
    }
    for part in parts or (adapter,)
  }
  value = {
    "method": "+".join(groups),
    "settings": in_file(groups if parts else groups.popitem()[1]),
    "fused": {layer: dict(parts) for layer, parts in adapted.fused.items()},
  }
  # as it will be read: lists for tuples, numbers for numpy's
  return json.loads(json.dumps(value, default=lambda x: x.item()))


def fingerprint(frozen: Mapping[TreePath, Any]) -> str:
  """sha256 over names, types, shapes and values of a base's leaves, by path.

  It is the same for looped and stacked layers, where `named_slices` knows
  these, and for a quantised kernel and the weights that its codes make.
  """
  named: dict[str, Any] = {}
  for path, leaf in frozen.items():
    named |= named_slices(path, np.asarray(plain(leaf)))
  sha = hashlib.sha256()
  for name in sorted(named):
    value = named[name]
    sha.update(f"{name} {value.dtype.name} {value.shape}\n".encode())
    sha.update(value.tobytes())
  return sha.hexdigest()


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
  wrong = list(misfits(saved.tensors, trained))
  if wrong:
    raise UserError(
      f"The adapter {saved.folder} does not fit the model:\n  "
      + "\n  ".join(wrong)
    )
  return leaves_by_path(saved.tensors, trained)


def misfits(tensors: Mapping[str, np.ndarray], trained: Flat) -> Iterator[str]:
  """What lacks, what is too much and what has another shape, in words."""
  expected = {
    name: leaf.shape[1:] if is_stacked(path, leaf) else leaf.shape
    for path, leaf in trained.items()
    for name, _ in named_slices(path, leaf)
  }
  lacking = [name for name in expected if name not in tensors]
  beyond = [name for name in tensors if name not in expected]
  if lacking:
    yield f"no {some(lacking)} in the file"
  if beyond:
    yield f"no place for {some(beyond)}: are targets and method right?"
  unequal = [
    f"{name} has shape {tensors[name].shape}, not {shape}"
    for name, shape in expected.items()
    if name in tensors and tensors[name].shape != shape
  ]
  if unequal:
    yield f"{some(unequal)}: are rank and labels right?"


def leaves_by_path(tensors: Mapping[str, np.ndarray], trained: Flat) -> Flat:
  """The file's tensors as float32 leaves, stacked where the tree is."""
  leaves = {}
  for path, leaf in trained.items():
    values = [tensors[name] for name, _ in named_slices(path, leaf)]
    value = np.stack(values) if is_stacked(path, leaf) else values[0]
    leaves[path] = value.astype(np.float32)
  return leaves


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
  computed = kept_digest(adapter, projections)
  if computed != expected:
    raise UserError(
      f"The projections of the adapter {saved.folder} come out different from"
      f" those it was trained with: digest {str(computed)[:12]}, not"
      f" {str(expected)[:12]}. Either its seed, init or rank was changed, or"
      " this version of jax draws other numbers."
    )
  return projections


def some(names: Sequence[str]) -> str:
  """The first of these names, and how many more there are."""
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more
