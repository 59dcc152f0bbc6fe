"""A trained model: a base with a saved adapter on it, or a whole folder.

`restore_adapter` rebuilds what a run trained from the adapter's two files and
the base, and refuses whatever is not what the adapter was trained with.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from vera_jax.adapters.files import SavedAdapter, check_used
from vera_jax.adapters.interface import Adapter, Target
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.labels import FROZEN
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.plans import AUTO
from vera_jax.adapters.saved import (
  is_held,
  read_leaves,
  read_projections,
  some,
)
from vera_jax.adapters.stored_pair import take_stored
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.models.family import (
  Family,
  family_of,
  label_names,
  one_of,
)
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import (
  fingerprint,
  load_params,
  read_model,
  refuse_gaps,
)
from vera_jax.models.kinds import (
  CLASSES,
  KINDS,
  NUMBER,
  TAGS,
  WORDS,
  kind_of,
  kind_of_problem,
)
from vera_jax.operations.quantised import NONE, plain
from vera_jax.pretrained.blueprint import blueprint, find_codes

MERGED = "merge.json"  # what `export_hf.write_merged` says of a merged folder


class Classifier(NamedTuple):
  """A trained classifier, or a decoder: what its use and merging need.

  Attributes:
    module: the model, with the adapter on it where the method has one.
    params: the whole parameter tree, adapter leaves included.
    projections: A and B; {} where the method has none.
    family, config: of the base.
    folder: config.json and tokenizer files.
    labels: names in the order of the logits; () for regression and words.
    kind: what the logits mean, a name in `kinds.KINDS`.
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
  kind: str
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
    """Logits of a text, or a token: one per label, or a regression's value."""
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
  codes: bool = False,
) -> Classifier:
  """Put a saved adapter back on its base.

  A base that was quantised in training is quantised again, for the adapter
  belongs to the weights that the codes make.

  Args:
    saved: from `load_adapter`.
    base: the base's folder or hub id; None for the one the adapter names.
    dtype: of the forward pass, as for `blueprint`.
    scan: whether the layers are one stack, as for `blueprint`.
    plan: how low-rank products are multiplied, as for `blueprint`.
    codes: whether a quantised base stays in codes, which takes less memory and
      more time; else the weights that they make are loaded.

  Raises:
    UserError: naming what differs from what the adapter was trained with:
      base, codes, targets, rank, shapes, projections.
  """
  about = saved.about
  folder = find_base(saved, base)
  labels = tuple(map(str, about["labels"]))
  kind = kind_of(about, labels)
  adapter, targets = make_adapter(about["method"], about["settings"])
  saved, adapter = take_stored(saved, adapter)
  made = blueprint(
    read_model(folder),
    outputs=len(labels) or 1,
    head=KINDS[kind].head,
    adapter=(adapter, targets),
    dtype=dtype,
    scan=scan,
    plan=plan,
    quantise=about.get("quantise") or NONE,
  )

  # Frozen leaves from the base. What it lacks, what the method trains of it,
  # and modules of it that PEFT trained whole, are in the adapter's file.
  shapes = made.shapes | flatten_dict(made.own_shapes()[0])
  kinds = flatten_dict(made.label(unflatten_dict(shapes)))
  frozen = {
    path: leaf
    for path, leaf in shapes.items()
    if kinds[path] == FROZEN
    and path in made.shapes
    and not is_held(saved, path, leaf)
  }
  loaded = load_params(
    folder,
    unflatten_dict(frozen),
    quantise=made.quantise,
    kernels=made.kernels,
  )
  refuse_gaps(folder, loaded.missing)
  _check_codes(saved, find_codes(made, loaded.params)[0])
  filled = flatten_dict(loaded.params)
  if not codes:
    filled = {path: plain(leaf) for path, leaf in filled.items()}
  filled |= read_leaves(
    saved, {path: leaf for path, leaf in shapes.items() if path not in filled}
  )
  params = jax.tree.map(
    jnp.asarray, unflatten_dict({path: filled[path] for path in shapes})
  )
  projections = read_projections(saved, adapter, made.targets, params)
  return Classifier(
    made.module,
    params,
    projections,
    made.family,
    made.config,
    folder,
    labels,
    kind,
    about,
    adapter,
    made.targets,
  )


def load_classifier(
  name: str | Path,
  *,
  dtype: DTypeLike = jnp.float32,
  scan: bool = True,
  quantise: str = NONE,
) -> Classifier:
  """A whole classifier or decoder from a folder in Hugging Face's layout.

  Args:
    name: the folder, a GGUF file, or a hub id.
    dtype: of weights and of computing.
    scan: whether the layers are stacked.
    quantise: how kernels are stored, a name in `quantised.CHOICES`.

  Raises:
    UserError: also where the folder holds an encoder without a head.
  """
  folder = resolve(name)
  fields = read_model(folder)
  names = label_names(fields)
  kind = _kind_of_folder(fields, len(names))
  if kind == WORDS:
    names = []
  head = KINDS[kind].head
  made = blueprint(
    fields,
    outputs=len(names),
    head=head,
    dtype=dtype,
    scan=scan,
    quantise=quantise,
  )
  loaded = load_params(
    folder,
    unflatten_dict(made.shapes),
    quantise=quantise,
    kernels=made.kernels if quantise != NONE else (),
  )
  if loaded.missing:
    raise UserError(
      f"{folder} is no whole {'decoder' if kind == WORDS else 'classifier'}: it"
      f" lacks {some(loaded.missing)}."
    )
  if loaded.unexpected:
    raise UserError(
      f"{folder} is another network than its config.json says: there is no"
      f" place for its tensors {some(loaded.unexpected)}. If they are of no"
      " use, take them out of the file."
    )
  merged = folder / MERGED
  about = read_json(merged) if merged.exists() else {}
  check_used(about, merged)
  return Classifier(
    made.module,
    jax.tree.map(jnp.asarray, loaded.params),
    {},
    made.family,
    made.config,
    folder,
    () if kind == NUMBER else tuple(names),
    kind,
    about,
    made.adapter,
    {},
  )


def _kind_of_folder(fields: Mapping[str, Any], outputs: int) -> str:
  """What the logits of a checkpoint mean, by its config.json."""
  heads = {
    _ending(name): head for head, name in family_of(fields).classes.items()
  }
  written = fields.get("architectures")
  written = list(map(str, written)) if isinstance(written, list) else []
  named = [_ending(name) for name in written if _ending(name)]
  if named and not heads.keys() & named:
    raise UserError(
      f"config.json: it is a {', '.join(written)}; of a"
      f" {fields['model_type']} there is here what ends with"
      f" {' or '.join(heads)}."
    )
  if set(heads.values()) == {KINDS[WORDS].head}:
    return WORDS
  if any(heads.get(ending) == KINDS[TAGS].head for ending in named):
    return TAGS
  one_of(fields, "problem_type", {kind.problem_type for kind in KINDS.values()})
  problem = kind_of_problem(fields.get("problem_type"))
  return problem or (NUMBER if outputs == 1 else CLASSES)


def _ending(name: str) -> str:
  """The part of a class's name that says its head; "" for a base alone."""
  return (re.findall(r"For[A-Z]\w+$|LMHeadModel$", name) or [""])[0]


def find_base(saved: SavedAdapter, base: str | Path | None) -> Path:
  """The base's folder, whose weights are those that were trained on."""
  named = saved.base
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


def _check_codes(saved: SavedAdapter, found: str | None) -> None:
  """Refuse a base whose codes are not those of training."""
  expected = saved.about.get("codes_digest")
  if found != expected:
    raise UserError(
      f"The {saved.about.get('quantise')} codes of the base come out different"
      f" from those that the adapter {saved.folder} was trained on: digest"
      f" {str(found)[:12]}, not {str(expected)[:12]}. Either its adapter.json"
      " was changed, or this version of vera_jax rounds in another way."
    )
