"""The one place that builds a model: base, adapter and head.

Training, prediction, merging, the bank and the compiled plans all start here:
`blueprint` says what a model is made of, from shapes alone; `load_model` gives
it pretrained weights and fresh leaves, `restore_adapter` those of a saved
adapter, `load_classifier` those of a whole folder.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from vera_jax.adapters.apply import Adapted, adapt
from vera_jax.adapters.files import STORED, SavedAdapter, named_slices
from vera_jax.adapters.interface import EMPTY, Adapter, Target
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.labels import FROZEN, Counts, count, label_tree, split
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.products import AUTO
from vera_jax.adapters.projections import PRNG, digest
from vera_jax.adapters.sites import first_leaves, make_shared
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.hub import resolve
from vera_jax.models.family import Family, family_of, read_fields
from vera_jax.models.hf_weights import fingerprint, load_params, refuse_gaps
from vera_jax.train.sharding import (
  REPLICATED,
  check_heads,
  param_shardings,
  put,
)

SHOWN = 3  # differences of one kind that a message lists
MERGED = "merge.json"  # what `export_hf.write_merged` says of a merged folder
Flat = dict[TreePath, Any]


class Blueprint(NamedTuple):
  """What a model is made of; no weights.

  Attributes:
    family, config: of the base.
    module: the base and its head, with the adapter on them.
    targets: the adapted sites, by path.
    dtype: of frozen leaves and of computing.
    shapes: of every leaf of base and head, by path.
    inputs: example shapes of the module's inputs.
  """

  family: Family
  config: Any
  module: Adapted
  targets: dict[TreePath, Target]
  dtype: DTypeLike
  shapes: Flat
  inputs: dict[str, Any]

  @property
  def adapter(self) -> Adapter:
    return self.module.adapter

  def projections(self, params: Any) -> dict[str, Any]:
    """The `projections` collection, on these weights (or their shapes)."""
    return make_shared(self.adapter, self.targets, params)

  def label(self, params: Any, new: Any = ()) -> dict[str, Any]:
    """adapter, head or frozen for every leaf; `new` leaves had no weights."""
    return label_tree(params, self.adapter, new=new)

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
      whole = unflatten_dict(flatten_dict(params) | fresh)
      own = first_leaves(self.adapter, self.targets, whole, projections, key)
      return fresh, flatten_dict(own)

    fresh, own = start(key, params, projections)
    return fresh | own


def blueprint(
  fields: Mapping[str, Any],
  *,
  outputs: int,
  head: str = "classification",
  method: str = "head",
  settings: Mapping[str, Any] = EMPTY,
  adapter: tuple[Adapter, tuple[str, ...]] | None = None,
  dtype: DTypeLike = jnp.float32,
  scan: bool = True,
  remat: str = "none",
  plan: str = AUTO,
) -> Blueprint:
  """A model by its config.json and its method.

  Args:
    fields: of config.json.
    outputs: of the head, per example.
    head: the kind of head, as the family knows it.
    method, settings: a name in `methods.METHODS`, and its group of a config.
    adapter: in place of these, an adapter and the patterns of its targets.
    dtype: of frozen leaves and of computing; what is trained is float32.
    scan: whether the layers are stacked; either serves any adapter.
    remat: "none", "full" or "dots".
    plan: how low-rank deltas multiply, "auto" or one of `products.PLANS`.

  Raises:
    UserError: a family, setting or target that is not there.
  """
  family = family_of(fields)
  config = family.config(fields)
  base = family.module(
    config,
    head,
    outputs,
    dtype=dtype,
    param_dtype=dtype,
    scan=scan,
    remat=remat,
  )
  given, targets = adapter or make_adapter(method, settings)
  module = adapt(
    base,
    given,
    targets=targets,
    plan=plan,
    forwards=1 if remat == "none" else 2,
  )
  inputs = family.inputs(1, 8, 1)
  shapes = jax.eval_shape(base.init, jax.random.key(0), **inputs)["params"]
  return Blueprint(
    family=family,
    config=config,
    module=module,
    targets=module.find_targets(**inputs) if targets else {},
    dtype=dtype,
    shapes=flatten_dict(shapes),
    inputs=inputs,
  )


class Model(NamedTuple):
  """A blueprint's parameters, as training takes them.

  Attributes:
    blueprint: what they belong to.
    labels: adapter or head, of the trainable leaves.
    counts: numbers of each kind.
    trainable, frozen: two trees that share no leaf.
    projections: A and B; {} where the method has none.
    digest: the projections'.
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
  notes: tuple[str, ...] = ()
  fresh: tuple[TreePath, ...] = ()


def load_model(
  plan: Blueprint, folder: Path, *, mesh: Mesh, seed: int
) -> Model:
  """The pretrained base with the method's first leaves and a new head.

  A leaf's value comes from, first that applies: a checkpoint of this run (the
  loop restores it), the pretrained files, fresh random numbers. The adapter's
  leaves are made on the loaded weights.
  """
  check_heads(plan.config.num_attention_heads, mesh)
  labels = flatten_dict(plan.label(unflatten_dict(plan.shapes)))
  template = {
    path: jax.ShapeDtypeStruct(
      leaf.shape, plan.dtype if labels[path] == FROZEN else jnp.float32
    )
    for path, leaf in plan.shapes.items()
  }
  loaded = load_params(folder, unflatten_dict(template))
  refuse_gaps(folder, loaded.missing)
  base = put(
    loaded.params, param_shardings(loaded.params, mesh, plan.family.rules)
  )
  projections = put(plan.projections(base), NamedSharding(mesh, REPLICATED))
  new = [path for path in plan.shapes if path not in flatten_dict(base)]
  fresh = plan.fresh_leaves(base, projections, new, seed)
  own = unflatten_dict(fresh)
  own = put(own, param_shardings(own, mesh, plan.family.rules))
  params = unflatten_dict(flatten_dict(base) | flatten_dict(own))
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
    digest=digest(projections) if projections else None,
    notes=tuple(notes),
    fresh=tuple(new),
  )


def abstract_model(plan: Blueprint, *, mesh: Mesh) -> Model:
  """`load_model`'s result as shapes with places: enough to compile a step."""
  base = unflatten_dict(plan.shapes)
  everywhere = NamedSharding(mesh, REPLICATED)

  def build(base: Any) -> Any:
    projections = plan.projections(base)
    key = jax.random.key(0)
    own = first_leaves(plan.adapter, plan.targets, base, projections, key)
    return own, projections

  own, projections = jax.eval_shape(build, base)
  shapes = unflatten_dict(plan.shapes | flatten_dict(own))
  labels = flatten_dict(plan.label(shapes))
  places = flatten_dict(param_shardings(shapes, mesh, plan.family.rules))
  stored = {
    path: jax.ShapeDtypeStruct(
      leaf.shape,
      plan.dtype if labels[path] == FROZEN else jnp.float32,
      sharding=places[path],
    )
    for path, leaf in flatten_dict(shapes).items()
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


class Classifier(NamedTuple):
  """A trained classifier: what prediction and merging need.

  Attributes:
    module: the model, with the adapter on it where the method has one.
    params: the whole parameter tree, adapter leaves included.
    projections: A and B; {} where the method has none.
    family, config: of the base.
    folder: config.json and tokenizer files.
    labels: names in the order of the logits; () for regression.
    about: of adapter.json or merge.json; {} for another folder.
    adapter, targets: the method and the sites that it is on.
  """

  module: nn.Module
  params: dict[str, Any]
  projections: dict[str, Any]
  family: Family
  config: Any
  folder: Path
  labels: tuple[str, ...]
  about: dict[str, Any]
  adapter: Adapter
  targets: dict[TreePath, Target]

  @property
  def variables(self) -> dict[str, Any]:
    """What `module.apply` takes first."""
    if self.projections:
      return {"params": self.params, "projections": self.projections}
    return {"params": self.params}

  @property
  def inputs(self) -> tuple[str, ...]:
    """The names of a packed batch's arrays that the module takes."""
    return tuple(self.family.inputs(1, 8, 1))

  @property
  def outputs(self) -> int:
    """Logits of a text: one per label, or the value of a regression."""
    return len(self.labels) or 1

  @property
  def max_length(self) -> int:
    """Where a text is cut: as in training, if that is known and fits."""
    trained = self.about.get("max_length")
    return min(trained, self.room) if isinstance(trained, int) else self.room

  @property
  def room(self) -> int:
    """The most tokens that a text may have."""
    return self.family.room(self.config)


def restore_adapter(
  saved: SavedAdapter,
  base: str | Path | None = None,
  *,
  dtype: DTypeLike = jnp.float32,
  scan: bool = True,
  plan: str = AUTO,
) -> Classifier:
  """Put a saved adapter back on its base.

  Args:
    saved: from `load_adapter`.
    base: the base's folder or hub id; None for the one the adapter names.
    dtype, scan, plan: as for `blueprint`.

  Raises:
    UserError: naming what differs from what the adapter was trained with:
      base, targets, rank, shapes, projections.
  """
  about = saved.about
  folder = _find_base(saved, base)
  labels = tuple(map(str, about["labels"]))
  given, targets = make_adapter(about["method"], about["settings"])
  if about["settings"].get("init") == STORED:
    saved, given = _take_stored(saved, given)
  made = blueprint(
    read_fields(folder),
    outputs=len(labels) or 1,
    adapter=(given, targets),
    dtype=dtype,
    scan=scan,
    plan=plan,
  )

  # Frozen leaves from the base. What it lacks, and what the method trains of
  # it, was trained and is in the adapter's file.
  whole = jax.eval_shape(made.module.init, jax.random.key(0), **made.inputs)[
    "params"
  ]
  kinds = flatten_dict(made.label(whole))
  shapes = flatten_dict(whole)
  frozen = {
    path: leaf
    for path, leaf in shapes.items()
    if kinds[path] == FROZEN and path in made.shapes
  }
  loaded = load_params(folder, unflatten_dict(frozen))
  refuse_gaps(folder, loaded.missing)
  filled = flatten_dict(loaded.params)
  trained = {path: leaf for path, leaf in shapes.items() if path not in filled}
  wrong = list(differences(saved.tensors, trained))
  if wrong:
    raise UserError(
      f"The adapter {saved.folder} does not fit what its adapter.json says:\n  "
      + "\n  ".join(wrong)
    )
  filled |= leaves_by_path(saved.tensors, trained)
  params = unflatten_dict({path: jnp.asarray(filled[path]) for path in shapes})

  projections = made.projections(params)
  if projections:
    _check_projections(saved, projections)
  return Classifier(
    made.module,
    params,
    projections,
    made.family,
    made.config,
    folder,
    labels,
    about,
    given,
    made.targets,
  )


def load_classifier(
  name: str | Path, *, dtype: DTypeLike = jnp.float32, scan: bool = True
) -> Classifier:
  """A whole classifier from a folder in Hugging Face's layout.

  Raises:
    UserError: also where the folder holds an encoder without a head.
  """
  folder = resolve(name)
  fields = read_fields(folder)
  try:
    count = int(fields.get("num_labels", 2))
    names = fields.get("id2label") or {i: f"LABEL_{i}" for i in range(count)}
    ordered = sorted((int(key), str(value)) for key, value in names.items())
  except (AttributeError, TypeError, ValueError) as error:
    raise UserError(f"{folder / 'config.json'}: no usable id2label.") from error
  regression = len(ordered) == 1 or fields.get("problem_type") == "regression"
  made = blueprint(fields, outputs=len(ordered), dtype=dtype, scan=scan)
  loaded = load_params(folder, unflatten_dict(made.shapes))
  if loaded.missing:
    raise UserError(
      f"{folder} is no whole classifier: it lacks {_some(loaded.missing)}."
    )
  merged = folder / MERGED
  return Classifier(
    made.module,
    jax.tree.map(jnp.asarray, loaded.params),
    {},
    made.family,
    made.config,
    folder,
    () if regression else tuple(value for _, value in ordered),
    read_json(merged) if merged.exists() else {},
    made.adapter,
    {},
  )


def _find_base(saved: SavedAdapter, base: str | Path | None) -> Path:
  """The base's folder, whose weights are those that were trained on."""
  named = saved.about["base"]
  try:
    folder = resolve(named if base is None else base)
  except UserError as error:
    raise UserError(
      f"The base {str(base or named)!r} of the adapter {saved.folder} is not"
      f" here; name its folder (--base=FOLDER). {error}"
    ) from error
  found, expected = fingerprint(folder), saved.about["base_fingerprint"]
  if found != expected:
    raise UserError(
      f"The adapter {saved.folder} was trained on another base than {folder}:"
      f" the weights of {named!r} have the fingerprint {expected[:12]}, those"
      f" {found[:12]}. Name the right folder (--base=FOLDER)."
    )
  return folder


def differences(
  found: Mapping[str, np.ndarray], trained: Flat
) -> Iterator[str]:
  """What lacks, what is too much and what has another shape, in words."""
  expected = {
    name: leaf.shape[1:] if "layer" in path else leaf.shape
    for path, leaf in trained.items()
    for name, _ in named_slices(path, leaf)
  }
  lacking = [name for name in expected if name not in found]
  beyond = [name for name in found if name not in expected]
  if lacking:
    yield f"no {_some(lacking)} in the file"
  if beyond:
    yield f"no place for {_some(beyond)}: are targets and method right?"
  unequal = [
    f"{name} has shape {found[name].shape}, not {shape}"
    for name, shape in expected.items()
    if name in found and found[name].shape != shape
  ]
  if unequal:
    yield f"{_some(unequal)}: are rank and labels right?"


def leaves_by_path(found: Mapping[str, np.ndarray], trained: Flat) -> Flat:
  """The file's tensors as float32 leaves, stacked where the tree is."""
  leaves = {}
  for path, leaf in trained.items():
    values = [found[name] for name, _ in named_slices(path, leaf)]
    value = np.stack(values) if "layer" in path else values[0]
    leaves[path] = value.astype(np.float32)
  return leaves


def _take_stored(
  saved: SavedAdapter, adapter: Adapter
) -> tuple[SavedAdapter, Adapter]:
  """The pair that no seed gives moves from the tensors to the adapter."""
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


def _check_projections(saved: SavedAdapter, made: Mapping[str, Any]) -> None:
  """Refuse projections that are not those of training."""
  prng, expected = (
    saved.about[f"projection_{name}"] for name in ("prng", "digest")
  )
  if prng != PRNG:
    raise UserError(
      f"The adapter {saved.folder} has its projections from the generator"
      f" {prng!r}; there is only {PRNG!r} here."
    )
  found = digest(made)
  if found != expected:
    raise UserError(
      f"The projections of the adapter {saved.folder} come out different from"
      f" those it was trained with: digest {found[:12]}, not"
      f" {str(expected)[:12]}. Either its seed, init or rank was changed, or"
      " this version of jax draws other numbers."
    )


def _some(names: Any) -> str:
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(list(names)[:SHOWN]) + more
