"""The one place that builds a model: base, adapter and head.

Training, prediction, merging, the bank and the compiled plans all start here:
`blueprint` says what a model is made of, from shapes alone. `load_model` gives
it pretrained weights and fresh leaves for training; `classifier.py` those of a
saved adapter or of a whole folder.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from vera_jax.adapters.apply import Adapted, adapt
from vera_jax.adapters.counting import plans_at
from vera_jax.adapters.interface import EMPTY, Adapter, Target
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.labels import (
  FROZEN,
  HEAD,
  Counts,
  count,
  label_tree,
  split,
)
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.plans import AUTO
from vera_jax.adapters.projections import kept_digest
from vera_jax.adapters.saved import Flat, own_shapes
from vera_jax.adapters.sites import first_leaves, make_shared
from vera_jax.adapters.targets import trace_sites
from vera_jax.errors import UserError
from vera_jax.models.decoder import Decoder
from vera_jax.models.family import Family, config_of, family_of
from vera_jax.models.hf_weights import (
  Bar,
  load_params,
  no_bar,
  refuse_gaps,
)
from vera_jax.operations.quantised import (
  BLOCK,
  KEEP,
  NF4,
  NONE,
  abstract_kernel,
  check_quantise,
  codes_digest,
  is_quantised,
)
from vera_jax.pretrained.sharding import (
  REPLICATED,
  check_heads,
  leaf_sharding,
  param_shardings,
  put,
  splits_of,
)

LOOPED = 12  # layers at most; their compiling takes seconds on a CPU


class Blueprint(NamedTuple):
  """What a model is made of; no weights.

  Attributes:
    family, config: of the base.
    module: the base and its head, with the adapter on them.
    targets: the adapted sites, by path.
    dtype: of frozen leaves and of computing.
    shapes: of every leaf of base and head, by path.
    inputs: example shapes of the module's inputs.
    scan: whether the layers are stacked.
    tokens: rows of x at each adapted site, for inputs of the sizes asked for.
    quantise: how frozen kernels are stored, a name in `quantised.CHOICES`.
  """

  family: Family
  config: Any
  module: Adapted
  targets: dict[TreePath, Target]
  dtype: DTypeLike
  shapes: Flat
  inputs: dict[str, Any]
  scan: bool
  tokens: dict[TreePath, int]
  quantise: str = NONE

  @property
  def adapter(self) -> Adapter:
    return self.module.adapter

  @property
  def heads(self) -> int:
    """How many heads a mesh's `tensor` has to divide."""
    heads = self.config.num_attention_heads
    return getattr(self.config, "num_key_value_heads", heads)

  @property
  def plans(self) -> dict[TreePath, str]:
    """How each low-rank delta multiplies, by path."""
    return plans_at(
      self.adapter,
      self.targets,
      self.tokens,
      plan=self.module.plan,
      forwards=self.module.forwards,
      splits=self.module.splits,
    )

  def own_shapes(self) -> tuple[Any, Any]:
    """The shapes of the adapter's leaves and of the projections."""
    base = unflatten_dict(self.shapes)
    return own_shapes(self.adapter, self.targets, base)

  def projections(self, params: Any) -> dict[str, Any]:
    """The `projections` collection, on these weights (or their shapes)."""
    return make_shared(self.adapter, self.targets, params)

  @property
  def kernels(self) -> tuple[TreePath, ...]:
    """What `quantise` is about: the frozen kernels of dense layers, and of a
    GGUF file the tables of words as well, unless an adapter is on them, which
    would dequantise them whole."""
    labels = flatten_dict(self.label(unflatten_dict(self.shapes)))

    def has_codes(path: TreePath, axes: int) -> bool:
      if path[-1] == "embedding":
        return self.quantise == KEEP and path[:-1] not in self.targets
      head = re.fullmatch(self.family.output, "/".join(path))
      return path[-1] == "kernel" and not head and axes == 2

    return tuple(
      path
      for path, leaf in self.shapes.items()
      if labels[path] == FROZEN
      and has_codes(path, len(leaf.shape) - ("layer" in path))
    )

  def label(self, params: Any, new: Any = ()) -> dict[str, Any]:
    """adapter, head or frozen for every leaf; `new` leaves had no weights."""
    family, head = self.family, self.family.head
    if self.adapter.name == HEAD:
      head = family.output or head
    return label_tree(
      params, self.adapter, head=head, fixed=family.fixed, new=new
    )

  def fresh_leaves(
    self, params: Any, projections: Any, new: list[TreePath], seed: int
  ) -> Flat:
    """First values of the leaves that no checkpoint gave, and the adapter's.

    Args:
      params: the whole base, its new leaves left out.
      projections: the collection.
      new: paths of base or head that start from random values.
      seed: of all of them.
    """
    key = jax.random.key(seed)

    @jax.jit
    def start(key, params, projections):
      inputs: dict[str, Any] = {
        name: jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in self.inputs.items()
      }
      # XLA drops the work for the leaves that are not asked for
      first = flatten_dict(self.module.model.init(key, **inputs)["params"])
      fresh = {path: first[path] for path in new}
      base = unflatten_dict(flatten_dict(params) | fresh)
      adapter = first_leaves(self.adapter, self.targets, base, projections, key)
      return fresh | flatten_dict(adapter)

    return start(key, params, projections)


def choose_scan(
  choice: bool | str,
  *,
  layers: int,
  platform: str | None = None,
  quantise: str = NONE,
) -> bool:
  """Whether layers are stacked, so that one is compiled for all.

  Looped layers run faster and take longer to compile, the longer the more there
  are. "auto" loops up to `LOOPED` of them, but none on a TPU, for whose chips a
  layer takes long to compile, and none of a quantised base: of looped layers
  XLA on a CPU merges what is to be computed again in the backward pass with the
  forward pass, and so keeps every dequantised kernel.

  Args:
    choice: true, false or "auto".
    layers: of the base.
    platform: of the devices; None for this process's.
    quantise: as for `blueprint`.

  Raises:
    UserError: another choice.
  """
  if choice == AUTO:
    platform = platform or jax.default_backend()
    return platform == "tpu" or layers > LOOPED or quantise != NONE
  if choice not in (True, False):
    raise UserError(
      f"config.model.scan is {choice!r}; choose {AUTO}, true or false."
    )
  return bool(choice)


def blueprint(
  fields: Mapping[str, Any],
  *,
  outputs: int,
  head: str = "classification",
  method: str = "head",
  settings: Mapping[str, Any] = EMPTY,
  adapter: tuple[Adapter, tuple[str, ...]] | None = None,
  dtype: DTypeLike = jnp.float32,
  scan: bool | str = True,
  remat: str = "none",
  plan: str = AUTO,
  sizes: tuple[int, int, int] | None = None,
  longest: int | None = None,
  quantise: str = NONE,
  mesh: Mesh | None = None,
) -> Blueprint:
  """A model by its config.json and its method.

  Args:
    fields: of config.json.
    outputs: of the head, per example.
    head: the kind of head, as the family knows it.
    method, settings: a name in `methods.METHODS`, and its group of a config.
    adapter: in place of these, an adapter and the patterns of its targets.
    dtype: of frozen leaves and of computing; what is trained is float32.
    scan: whether the layers are stacked, or "auto" (`choose_scan`); either
      serves any adapter.
    remat: "none", "full" or "dots".
    plan: how low-rank deltas multiply, "auto" or one of `products.PLANS`.
    sizes: rows, length and slots of the batches that `Blueprint.plans` is of;
      None for the family's example.
    longest: tokens of the longest text, for a decoder that is given long rows
      of many texts (`bands.py`).
    quantise: how the frozen kernels are stored, a name in `quantised.CHOICES`.
    mesh: that it will be trained on, by which plans are priced; None for one
      device.

  Raises:
    UserError: a family, setting or target that is not there.
  """
  check_quantise(quantise)
  family = family_of(fields)
  if head not in family.classes:
    raise UserError(
      f"{fields['model_type']} has no head for {head} here; it has"
      f" {', '.join(family.classes)}."
    )
  config = config_of(fields)
  layers = config.num_hidden_layers
  scan = choose_scan(scan, layers=layers, quantise=quantise) and family.stacks
  options: dict[str, Any] = {} if longest is None else {"longest": longest}
  base = family.module(
    config,
    head,
    outputs,
    dtype=dtype,
    param_dtype=dtype,
    scan=scan,
    remat=remat,
    **options,
  )
  method_adapter, targets = adapter or make_adapter(method, settings)
  module = adapt(
    base,
    method_adapter,
    targets=targets,
    fused=family.fused(config),
    plan=plan,
    forwards=1 if remat == "none" else 2,
  )
  sites, calls, variables = trace_sites(
    base,
    targets,
    fused=module.fused,
    **family.inputs(*(sizes or family.example)),
  )
  if mesh is not None:
    splits = splits_of(sites, mesh, family.rules)
    module = module.clone(splits=FrozenDict(splits))
  return Blueprint(
    family=family,
    config=config,
    module=module,
    targets=sites,
    dtype=dtype,
    shapes=flatten_dict(variables["params"]),
    inputs=family.inputs(*family.example),
    scan=scan,
    tokens={path: call.tokens for path, call in calls.items()},
    quantise=quantise,
  )


def decoder_in(module: Any, config: Any) -> Decoder:
  """The model under an adapter, or without one, if it can write texts.

  Raises:
    UserError: it has no cache.
  """
  plain = module.model if isinstance(module, Adapted) else module
  if not isinstance(plain, Decoder):
    raise UserError(
      f"{config.model_type} has no cache here, by which texts are written: it"
      " can be trained, scored and merged."
    )
  return plain


class Model(NamedTuple):
  """A blueprint's parameters, as training takes them.

  Attributes:
    blueprint: what they belong to.
    labels: adapter or head, of the trainable leaves.
    counts: numbers of each kind.
    trainable, frozen: two trees that share no leaf.
    projections: A and B; {} where the method has none.
    digest: the projections'.
    codes: the digest of the kernels' codes, where these were computed here: a
      file's own are known by its fingerprint.
    notes: which weights found no partner in the checkpoint or in the model.
    fresh: paths of base or head that started from random values.
  """

  blueprint: Blueprint
  labels: dict[str, Any]
  counts: Counts
  trainable: dict[str, Any]
  frozen: dict[str, Any]
  projections: dict[str, Any]
  digest: str | None = None
  codes: str | None = None
  notes: tuple[str, ...] = ()
  fresh: tuple[TreePath, ...] = ()


def load_model(
  plan: Blueprint, folder: Path, *, mesh: Mesh, seed: int, bar: Bar = no_bar
) -> Model:
  """The pretrained base with the method's first leaves and a new head.

  A leaf's value comes from, first that applies: a checkpoint of this run (the
  loop restores it), the pretrained files, fresh random numbers. The adapter's
  leaves are made on the loaded weights. `bar` is as for `load_params`.
  """
  check_heads(plan.heads, mesh)
  labels = flatten_dict(plan.label(unflatten_dict(plan.shapes)))
  template = {
    path: jax.ShapeDtypeStruct(
      leaf.shape, plan.dtype if labels[path] == FROZEN else jnp.float32
    )
    for path, leaf in plan.shapes.items()
  }
  loaded = load_params(
    folder,
    unflatten_dict(template),
    quantise=plan.quantise,
    kernels=plan.kernels,
    place=partial(leaf_sharding, mesh=mesh, rules=plan.family.rules),
    bar=bar,
  )
  refuse_gaps(folder, loaded.missing)
  base = loaded.params
  codes, quantised = find_codes(plan, base)
  projections = put(plan.projections(base), NamedSharding(mesh, REPLICATED))
  new = [path for path in plan.shapes if path not in flatten_dict(base)]
  fresh = plan.fresh_leaves(base, projections, new, seed)
  added = unflatten_dict(fresh)
  added = put(added, param_shardings(added, mesh, plan.family.rules))
  params = unflatten_dict(flatten_dict(base) | flatten_dict(added))
  named = plan.label(params, new)
  trainable, frozen = split(params, named)
  notes = [
    f"{what}: {', '.join(names)}"
    for what, names in (
      ("new, trained from random values", sorted("/".join(p) for p in new)),
      ("not used, no such parameter here", loaded.unexpected),
      ("not used, not part of the model", loaded.dropped),
    )
    if names
  ]
  return Model(
    blueprint=plan,
    labels=split(named, named)[0],
    counts=count(params, named),
    trainable=trainable,
    frozen=frozen,
    projections=projections,
    digest=kept_digest(plan.adapter, projections),
    codes=codes,
    notes=(*quantised, *notes),
    fresh=tuple(new),
  )


def find_codes(plan: Blueprint, params: Any) -> tuple[str | None, list[str]]:
  """(the digest as in `Model.codes`, a line for a person or none).

  Raises:
    UserError: none of the kernels could be quantised.
  """
  if plan.quantise == NONE:
    return None, []
  flat = flatten_dict(params)
  # what the files lack starts anew, and is trained
  kernels = [flat[path] for path in plan.kernels if path in flat]
  coded = [leaf for leaf in kernels if is_quantised(leaf)]
  if not coded:
    why = {
      KEEP: "the file has none of them in codes that are kept (Q2_K to Q6_K,"
      " Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0)",
      NF4: f"their inputs are no multiples of {BLOCK}",
    }.get(plan.quantise, "the method trains them all")
    why = why if kernels else "the method trains them all, or there are none"
    raise UserError(
      f"config.model.quantise is {plan.quantise}, but no kernel of the model"
      f" can be stored so: {why}. Choose another, or {NONE}."
    )
  numbers = sum(leaf.size for leaf in coded)
  stored = sum(leaf.nbytes for leaf in coded)
  plainly = len(kernels) - len(coded)
  line = (
    f"quantised ({plan.quantise}): {numbers:,} numbers of the base in"
    f" {stored / 1e6:,.1f} MB, {8 * stored / numbers:.2f} bits each"
  )
  if plainly:
    line += f"; {plainly} of {len(kernels)} kernels can't be, and are left"
  return None if plan.quantise == KEEP else codes_digest(params), [line]


def abstract_model(plan: Blueprint, *, mesh: Mesh) -> Model:
  """`load_model`'s result as shapes with places: enough to compile a step."""
  check_heads(plan.heads, mesh)
  everywhere = NamedSharding(mesh, REPLICATED)
  own, projections = plan.own_shapes()
  shapes = unflatten_dict(plan.shapes | flatten_dict(own))
  labels = flatten_dict(plan.label(shapes))
  stored: Flat = {
    path: jax.ShapeDtypeStruct(
      leaf.shape, plan.dtype if labels[path] == FROZEN else jnp.float32
    )
    for path, leaf in flatten_dict(shapes).items()
  }
  if plan.quantise != NONE:
    for path in plan.kernels:
      stored[path] = abstract_kernel(stored[path], plan.quantise)
  places = flatten_dict(
    param_shardings(unflatten_dict(stored), mesh, plan.family.rules)
  )
  stored = {
    path: jax.tree.map(
      lambda part, place: part.update(sharding=place), leaf, places[path]
    )
    for path, leaf in stored.items()
  }
  named = unflatten_dict(labels)
  trainable, frozen = split(unflatten_dict(stored), named)
  return Model(
    blueprint=plan,
    labels=split(named, named)[0],
    counts=count(shapes, named),
    trainable=trainable,
    frozen=frozen,
    projections=jax.tree.map(
      lambda leaf: leaf.update(sharding=everywhere), projections
    ),
  )
