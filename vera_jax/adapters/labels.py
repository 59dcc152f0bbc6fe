"""One label per parameter: `adapter`, `head` or `frozen`.

The label tree is what the optimiser, the checkpoints, the counts and the
adapter's files read. The training step differentiates with respect to the
trainable leaves only: `split` takes them out of a whole tree, and `join` puts
them back.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.interface import Adapter, Path
from vera_jax.adapters.methods import adapter_named
from vera_jax.errors import UserError
from vera_jax.patterns import find

ADAPTER, HEAD, FROZEN = "adapter", "head", "frozen"


def label_tree(
  params: Mapping[str, Any],
  method: Adapter | str,
  *,
  head: str | None = None,
  fixed: str = "",
  new: Collection[Path] = (),
) -> dict[str, Any]:
  """Label every leaf; the first rule that fits wins.

  Args:
    params: the whole parameter tree, or its shapes.
    method: the adapter, or a method's name.
    head: pattern of the head's leaves, over whole paths; None for
      "classifier/.*", if there are such, and "" for no head.
    fixed: pattern of leaves that no method trains.
    new: paths of leaves that the checkpoint lacks: they start at random and are
      trained with the head, unless they are the adapter's own.

  Raises:
    UserError: the head's pattern matches no leaf; or the method trains leaves
      of the base, of which this one has none.
  """
  adapter = adapter_named(method) if isinstance(method, str) else method
  flat = flatten_dict(dict(params))
  trains = adapter.trains
  if trains is not None and not any(find(trains, "/".join(p)) for p in flat):
    raise UserError(
      f"{adapter.name} trains the leaves whose paths match {trains!r}, and the"
      " model has none; choose another method or pattern."
    )

  if head and not any(find(head, "/".join(path)) for path in flat):
    modules = dict.fromkeys("/".join(path[:-1]) or path[-1] for path in flat)
    raise UserError(
      f"The head's pattern {head!r} matches no leaf's whole path, so that no"
      " head would be trained. The modules that hold leaves are:\n  "
      + "\n  ".join(modules)
    )
  pattern = "classifier/.*" if head is None else head

  def label(path: Path) -> str:
    name = "/".join(path)
    if re.fullmatch(fixed, name):
      return FROZEN
    if find(pattern, name):
      return HEAD
    if adapter.owns(path[-1]):
      return ADAPTER
    if trains is not None and find(trains, name):
      return ADAPTER
    return HEAD if path in new else FROZEN

  return unflatten_dict({p: label(p) for p in flat})


def split(
  params: Mapping[str, Any], labels: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(trainable, frozen): two trees that share no leaf."""
  flat, names = flatten_dict(dict(params)), flatten_dict(dict(labels))
  trainable = {p: x for p, x in flat.items() if names[p] != FROZEN}
  frozen = {p: x for p, x in flat.items() if names[p] == FROZEN}
  return unflatten_dict(trainable), unflatten_dict(frozen)


def join(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """The one tree that `split` took apart."""
  return unflatten_dict(flatten_dict(dict(a)) | flatten_dict(dict(b)))


class Counts(NamedTuple):
  """Numbers (not bytes) of each kind; the paper's counts are `adapter`."""

  adapter: int
  head: int
  frozen: int


def count(params: Mapping[str, Any], labels: Mapping[str, Any]) -> Counts:
  """How many numbers are trained in adapter and head, and how many are not."""
  sizes = dict.fromkeys((ADAPTER, HEAD, FROZEN), 0)
  names = flatten_dict(dict(labels))
  for path, leaf in flatten_dict(meta.unbox(dict(params))).items():
    sizes[names[path]] += math.prod(leaf.shape)
  return Counts(**sizes)
