"""What PEFT's form of a method is: one file beside this one per method."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vera_jax.adapters.interface import Adapter, LowRank, Site
from vera_jax.adapters.method import LARGEST
from vera_jax.adapters.sites import arrays_at
from vera_jax.errors import UserError
from vera_jax.peft_io.base import Layer
from vera_jax.peft_io.tensors import Tensors

Settings = dict[str, Any]
Fields = dict[str, Any]  # of adapter_config.json
MERGE = (
  "train it again without, or merge it in PEFT (merge_and_unload, then"
  " save_pretrained) and take the result as a base"
)


class Ours(NamedTuple):
  """An adapter of ours on its way to PEFT.

  Attributes:
    method, settings: as adapter.json has them.
    adapter: made of these.
    leaves: each adapted module's, by its name in Hugging Face's classifier.
    layers: all linear layers, and the parts of fused ones, by name.
    projections: the collection, in numpy.
    root: the trained leaves that all modules share.
  """

  method: str
  settings: Mapping[str, Any]
  adapter: Adapter
  leaves: dict[str, Tensors]
  layers: Mapping[str, Layer]
  projections: Mapping[str, Any]
  root: Tensors

  @property
  def parts(self) -> bool:
    """Whether some of the modules are parts of fused layers."""
    return any(self.layers[module].target.columns for module in self.leaves)

  def low_rank(self, module: str) -> LowRank:
    """The factors of a module's delta, of a chain those of its first link."""
    path, target = self.layers[module].path, self.layers[module].target
    at_layer = arrays_at(self.projections, path)
    shared, common, leaves = jax.tree.map(
      jnp.asarray,
      (
        {**arrays_at(self.projections), **at_layer},
        self.root,
        self.leaves[module],
      ),
    )
    site = Site(
      path,
      target.inputs,
      target.outputs,
      lambda: jnp.zeros((target.inputs, target.outputs)),
      shared=shared,
      common=common,
    )
    link = self.adapter.methods[0]
    assert link.low_rank is not None
    return link.low_rank(link.own(leaves), site)

  def key(self) -> int:
    """PEFT's projection_prng_key: what A and B come from, if PEFT knows it."""
    drawn_by_peft = self.settings.get("init") == "peft" and not self.parts
    return self.settings["projection_seed"] if drawn_by_peft else 0


class Exported(NamedTuple):
  """An adapter as PEFT has it.

  Attributes:
    leaves: each module's, by our names of them.
    fields: of adapter_config.json, beside those that all methods have.
    root: what all modules share, by our names of it.
  """

  leaves: dict[str, Tensors]
  fields: Fields
  root: Tensors = {}


class Form(NamedTuple):
  """A method of PEFT's.

  Attributes:
    endings: our leaves, by what stands behind a module's name in the file.
    fields: names of adapter_config.json that `settings` reads, or that are
      without effect on what a trained adapter computes.
    settings: adapter_config.json -> our method and its settings, but for the
      targets.
    write: our adapter -> PEFT's.
    root: by their names in the file, the tensors that all modules share: a
      trained leaf's name of ours, or that of a matrix of `projections`.
    trained_root: whether these are trained.
    dropped: endings of tensors that only repeat others.
    take: (ending, value, endings) -> our leaf's name and value.
    more: (adapted, layers, kinds -> patterns) -> settings that only the tensors
      tell.
    unchanged: our settings -> the values of leaves where a layer stays as it
      is, those that aren't 0.
    join: our adapter with parts of fused layers, and what `write` made of it ->
      PEFT's of whole layers. Without it such adapters are refused.
  """

  endings: dict[str, str]
  fields: frozenset[str]
  settings: Callable[[Fields], tuple[str, Settings]]
  write: Callable[[Ours], Exported]
  root: Mapping[str, str] = {}
  trained_root: bool = False
  dropped: tuple[str, ...] = ()
  take: Callable[..., tuple[str, np.ndarray]] = lambda ending, value, endings: (
    endings[ending],
    value,
  )
  more: Callable[..., Settings] = lambda adapted, layers, patterns: {}
  unchanged: Callable[[Mapping[str, Any]], dict[str, float]] = lambda _: {}
  join: Callable[[Ours, Exported], Exported] | None = None


def number(fields: Fields, name: str, default: float) -> float:
  """A field's number; a UserError for one that is none, or too large."""
  value = float(fields.get(name, default))
  if not abs(value) <= LARGEST:  # which NaN is not
    raise UserError(f"{name}={value}: a usual, finite number is needed.")
  return value


def count(fields: Fields, name: str, default: int) -> int:
  """A field's whole number, at least 1."""
  value = fields.get(name, default)
  if not isinstance(value, int) or not 1 <= value <= LARGEST:
    raise UserError(f"{name}={value!r}: it must be a whole number, at least 1.")
  return value


def seed(fields: Fields, name: str, default: int = 0) -> int:
  """A field's seed, of which torch takes 32 bits."""
  value = fields.get(name)
  return int(default if value is None else value) % 2**32
