"""The base of an adapter, and its linear layers by PEFT's names and by ours.

Only shapes are looked at, and the weights' fingerprint; no weights are loaded.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.adapters.apply import find_targets
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.interface import Target
from vera_jax.adapters.layers import LINEAR
from vera_jax.adapters.sites import EVERY, parts_of
from vera_jax.errors import UserError
from vera_jax.models.family import IMAGES, family_of
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import (
  fingerprint,
  module_name,
  module_path,
  read_model,
)
from vera_jax.pretrained.blueprint import Blueprint, blueprint

# PEFT's task_type -> the kind of head, as `Family.classes` has it.
TASK_TYPES = {"SEQ_CLS": "classification", "CAUSAL_LM": "language_modelling"}


class Layer(NamedTuple):
  """A linear layer, with the parts that its kernel is fused of.

  Attributes:
    path: in a looped tree, such as encoder/layer_3/output/dense.
    kind: the same without the layer's number: encoder/layer/output/dense.
    target: its widths.
    parts: first and last column of each part by name; {} for an ordinary one.
  """

  path: TreePath
  kind: TreePath
  target: Target
  parts: Mapping[str, tuple[int, int]]


class Base(NamedTuple):
  """What converting an adapter needs of its base.

  Attributes:
    folder: the base's folder.
    fields: of config.json.
    fingerprint: that of the weights.
    head: the kind of its head, as the family knows it.
    classifier: the base with its head, a classifier's of two outputs, in a
      looped tree of shapes.
    layers: `linear_layers` of it.
    older: whether modules have the names of the files, as transformers' classes
      had them before those that `Names.to_class` gives.
  """

  folder: Path
  fields: dict[str, Any]
  fingerprint: str
  head: str
  classifier: Blueprint
  layers: dict[str, Layer]
  older: bool = False

  @property
  def saved_modules(self) -> tuple[str, ...]:
    """Modules that a task may bring and train whole (modules_to_save)."""
    return tuple(new.rstrip("/") for new in self.classifier.family.names.new)

  @property
  def reads_images(self) -> bool:
    return self.classifier.family.reads == IMAGES

  def path(self, name: str) -> TreePath:
    """A module's path in a looped tree."""
    return module_path(name, self.classifier.family.names)

  def name(self, path: TreePath) -> str:
    """A module's name in Hugging Face's classifier."""
    return class_name(self.classifier, path, older=self.older)

  def named_as(self, tensors: Collection[str]) -> "Base":
    """With older names of modules, where these tensors have such."""
    older = linear_layers(self.classifier, older=True)
    gone = older.keys() - self.layers.keys()
    if any(name in tensor for name in gone for tensor in tensors):
      return self._replace(layers=older, older=True)
    return self


def open_base(
  name: str, about: Mapping[str, Any], *, head: str | None = None
) -> Base:
  """Find a base by its folder or hub id.

  Args:
    name: the folder or id.
    about: the adapter.json, which names the weights' fingerprint; PEFT's own
      files name none.
    head: the kind of head; None for the first one that the family has.

  Raises:
    UserError: the base is not there, not this adapter's, or quantised.
  """
  folder = resolve(name)
  weights = fingerprint(folder)
  if about.get("base_fingerprint") not in (None, weights):
    raise UserError(
      f"{folder} is not the base that the adapter was trained on: its weights"
      " have another fingerprint. Give the right one by --base=FOLDER."
    )
  fields = read_model(folder)
  if fields.get("quantization_config"):
    raise UserError(
      f"{folder} is quantised (quantization_config in its config.json); give"
      " the unquantised base by --base=FOLDER."
    )
  family = family_of(fields)
  if family.own:
    raise UserError(
      f"{folder} is a {fields['model_type']}, which transformers has no class"
      " for, so PEFT has no adapters for it."
    )
  kinds = family.classes
  head = head or next(iter(kinds))
  if head not in kinds:
    types = {kind: name for name, kind in TASK_TYPES.items()}
    raise UserError(
      f"task_type={types[head]!r}: the base is {fields['model_type']}, which"
      f" has no such head here, only {', '.join(kinds)}."
    )
  classifier = blueprint(fields, outputs=2, head=head, scan=False)
  layers = linear_layers(classifier)
  return Base(folder, fields, weights, head, classifier, layers)


def class_name(classifier: Blueprint, path: TreePath, *, older: bool) -> str:
  """A module's name in transformers' class, or an older class."""
  names = classifier.family.names
  name = module_name(path, names=names)
  return name if older else names.to_class(name)


def linear_layers(
  classifier: Blueprint, *, older: bool = False
) -> dict[str, Layer]:
  """Every linear layer by its name in Hugging Face's classifier.

  They come in the order of their calls: the last one gives a classifier's
  logits.
  """
  model, inputs = classifier.module.model, classifier.inputs
  layers = {}
  for path, target in find_targets(model, [EVERY], **inputs).items():
    if target.view.kind not in LINEAR:
      continue  # embeddings and convolutions
    kind = tuple(re.sub(r"^layer_\d+$", "layer", word) for word in path)
    name = class_name(classifier, path, older=older)
    parts = parts_of(path, classifier.module.fused)
    layers[name] = Layer(path, kind, target, parts)
  return layers


def target_patterns(
  kinds: Collection[TreePath], layers: Mapping[str, Layer]
) -> list[str]:
  """The shortest target pattern of ours for each of some kinds of layers.

  Args:
    kinds: what is adapted.
    layers: all that the model has; a pattern matches its own kind only.
  """
  there = {"/".join(layer.kind) for layer in layers.values()}
  patterns = []
  for kind in sorted(kinds):
    others = there - {"/".join(kind)}
    for start in range(len(kind) - 1, -1, -1):
      ending = "/".join(kind[start:])
      if not any(f"/{name}".endswith(f"/{ending}") for name in others):
        break
    patterns.append(re.sub(r"\blayer\b", r"layer(_\\d+)?", ending))
  return patterns


def module_list(
  names: Collection[str], layers: Mapping[str, Layer]
) -> list[str]:
  """PEFT's target_modules for these layers: endings, or else whole names."""
  listed: set[str] = set()
  for name in names:
    words = name.split(".")
    same = {n for n in layers if layers[n].kind == layers[name].kind}
    entry = name
    if same <= set(names):  # all layers of the kind: one ending may name them
      for start in range(len(words) - 1, 0, -1):
        ending = ".".join(words[start:])
        if {n for n in layers if n.endswith(f".{ending}")} == same:
          entry = ending
          break
    listed.add(entry)
  return sorted(listed)
