"""A trained classifier: a base with a saved adapter on it, or a merged folder.

`restore_adapter` rebuilds what a run trained from the adapter's two files and
the base, and refuses whatever is not what the adapter was trained with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.files import STORED, SavedAdapter, named_slices
from vera_jax.adapters.interface import Adapter, Target
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.labels import FROZEN, label_tree
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.products import AUTO
from vera_jax.adapters.projections import PRNG, digest
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.hub import resolve
from vera_jax.models.bert import BertClassifier, BertConfig
from vera_jax.models.hf_weights import (
  fingerprint,
  load_config,
  load_params,
  refuse_gaps,
)
from vera_jax.tasks.glue import GlueTask, glue_task

SHOWN = 3  # differences of one kind that a message lists
MERGED = "merge.json"  # what `merged.write_merged` says of a merged folder
Flat = dict[tuple[str, ...], Any]


class Classifier(NamedTuple):
  """What prediction and merging need.

  Attributes:
    module: the model, with the adapter on it where the method has one.
    params: the whole parameter tree, adapter leaves included.
    projections: A and B; {} where the method has none.
    config: the base's.
    folder: config.json and tokenizer files.
    labels: names in the order of the logits; () for regression.
    about: of adapter.json or merge.json; {} for another folder.
    adapter, targets: the method and the layers that it is on.
  """

  module: nn.Module
  params: dict[str, Any]
  projections: dict[str, Any]
  config: BertConfig
  folder: Path
  labels: tuple[str, ...]
  about: dict[str, Any]
  adapter: Adapter | None
  targets: dict[TreePath, Target]

  @property
  def variables(self) -> dict[str, Any]:
    """What `module.apply` takes first."""
    if self.projections:
      return {"params": self.params, "projections": self.projections}
    return {"params": self.params}

  @property
  def task(self) -> GlueTask | None:
    """The GLUE task that it was trained for; None if it was another."""
    try:
      return glue_task(str(self.about.get("task")))
    except UserError:
      return None

  @property
  def outputs(self) -> int:
    """Logits of a text: one a label, or the value of a regression."""
    return len(self.labels) or 1

  @property
  def max_length(self) -> int:
    """Where a text is cut: as in training, if that is known and fits."""
    trained = self.about.get("max_length")
    return min(trained, self.room) if isinstance(trained, int) else self.room

  @property
  def room(self) -> int:
    """The most tokens that a text may have."""
    return self.config.max_position_embeddings - self.config.first_position


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
    dtype: of the frozen leaves and of computing; what was trained is float32.
    scan: whether the layers are stacked; either serves any adapter.
    plan: how adapted layers multiply, "auto" or one of `contraction.PLANS`.

  Raises:
    UserError: naming what differs from what the adapter was trained with:
      base, targets, rank, shapes, projections.
  """
  about = saved.about
  folder = _find_base(saved, base)
  config = load_config(folder)
  labels = tuple(map(str, about["labels"]))
  model = BertClassifier(
    config, len(labels) or 1, dtype=dtype, param_dtype=dtype, scan=scan
  )
  adapter, patterns = make_adapter(
    about["method"], about["settings"], plan=plan
  )
  if about["settings"].get("init") == STORED and adapter is not None:
    saved, adapter = _take_stored(saved, adapter)
  module: nn.Module = model
  targets: dict[TreePath, Target] = {}
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  if adapter is not None:
    module = adapt(model, adapter, targets=patterns)
    targets = module.find_targets(ids)
  shapes = _shapes(module, ids)
  params = _fill(saved, folder, shapes)
  projections = _projections(saved, adapter, targets)
  return Classifier(
    module,
    unflatten_dict(params),
    projections,
    config,
    folder,
    labels,
    about,
    adapter,
    targets,
  )


def load_classifier(
  name: str | Path, *, dtype: DTypeLike = jnp.float32, scan: bool = True
) -> Classifier:
  """A whole classifier from a folder in Hugging Face's layout.

  Raises:
    UserError: also where the folder holds an encoder without a head.
  """
  folder = resolve(name)
  config = load_config(folder)
  fields = read_json(folder / "config.json")
  try:
    count = int(fields.get("num_labels", 2))
    names = fields.get("id2label") or {i: f"LABEL_{i}" for i in range(count)}
    ordered = sorted((int(key), str(value)) for key, value in names.items())
  except (AttributeError, TypeError, ValueError) as error:
    raise UserError(f"{folder / 'config.json'}: no usable id2label.") from error
  regression = len(ordered) == 1 or fields.get("problem_type") == "regression"
  module = BertClassifier(
    config, len(ordered), dtype=dtype, param_dtype=dtype, scan=scan
  )
  shapes = _shapes(module, jax.ShapeDtypeStruct((1, 8), jnp.int32))
  loaded = load_params(folder, unflatten_dict(shapes))
  if loaded.missing:
    raise UserError(
      f"{folder} is no whole classifier: it lacks {_some(loaded.missing)}."
    )
  labels = () if regression else tuple(value for _, value in ordered)
  merged = folder / MERGED
  about = read_json(merged) if merged.exists() else {}
  params = jax.tree.map(jnp.asarray, loaded.params)
  return Classifier(module, params, {}, config, folder, labels, about, None, {})


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


def _shapes(module: nn.Module, ids: Any) -> Flat:
  init = module.init
  return flatten_dict(jax.eval_shape(init, jax.random.key(0), ids)["params"])


def _fill(saved: SavedAdapter, folder: Path, shapes: Flat) -> Flat:
  """Every leaf: what was trained from the adapter, the rest from the base."""
  method = saved.about["method"]
  labels = flatten_dict(label_tree(unflatten_dict(shapes), method))
  frozen = {p: leaf for p, leaf in shapes.items() if labels[p] == FROZEN}
  loaded = load_params(folder, unflatten_dict(frozen))
  refuse_gaps(folder, loaded.missing)
  given = flatten_dict(loaded.params)
  # what the base lacks started at random and was trained
  trained = {p: leaf for p, leaf in shapes.items() if p not in given}
  wrong = list(differences(saved.tensors, trained))
  if wrong:
    raise UserError(
      f"The adapter {saved.folder} does not fit what its adapter.json says:\n  "
      + "\n  ".join(wrong)
    )
  filled = given | leaves_by_path(saved.tensors, trained)
  return {path: jnp.asarray(filled[path]) for path in shapes}


def differences(found: Mapping[str, np.ndarray], trained: Flat):
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
  stored = adapter._replace(projections=lambda targets: pair)
  return saved._replace(tensors=rest), stored


def _projections(
  saved: SavedAdapter,
  adapter: Adapter | None,
  targets: Mapping[TreePath, Target],
) -> dict[str, Any]:
  """A and B from the seed; not those of training is an error."""
  made = {} if adapter is None else adapter.projections(targets)
  if not made:
    return {}
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
  return made


def _some(names: Any) -> str:
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(list(names)[:SHOWN]) + more
