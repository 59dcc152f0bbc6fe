"""PEFT's adapter folder -> ours.

The names in PEFT's file say which layers are adapted; its config says which
should be, and the two must agree. Layers of a kind that PEFT left out
(`layers_to_transform`) get the adapter that changes nothing, as the method's
form says; DoRA's m is the norm of W0 there.
"""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax import results
from vera_jax.adapters.counting import leaf_shapes
from vera_jax.adapters.files import check_length, save_adapter
from vera_jax.adapters.interface import Adapter, Target
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.labels import HEAD
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.projections import (
  INITIALISERS,
  PRNG,
  STORED,
  digest,
)
from vera_jax.errors import UserError
from vera_jax.files import check_free
from vera_jax.hub import PACKAGE
from vera_jax.models.family import label_names
from vera_jax.models.hf_weights import load_params
from vera_jax.models.kinds import KINDS, WORDS, kind_of, kind_of_problem
from vera_jax.peft_io.base import Base, open_base, target_patterns
from vera_jax.peft_io.forms import FORMS, Form
from vera_jax.peft_io.forms.form import MERGE
from vera_jax.peft_io.settings import FILE as SETTINGS
from vera_jax.peft_io.settings import PeftSettings, is_target, read_settings
from vera_jax.peft_io.tensors import (
  FILE,
  PREFIX,
  Tensors,
  read_tensors,
)
from vera_jax.places import local_copy
from vera_jax.pretrained.blueprint import Blueprint, blueprint
from vera_jax.tasks.task import task_named

# What our own export knows of a run, whatever its task was.
RUN = ("seed", "max_length", "image_size", "versions")
HEAD_LEAVES = ("weight", "bias")
Leaves = dict[TreePath, np.ndarray]


def import_adapter(
  folder: Path,
  out: Path,
  *,
  base: str | None = None,
  task: str | None = None,
  max_length: int | None = None,
) -> dict[str, Any]:
  """Write a PEFT adapter, of a method in `forms.FORMS`, as ours.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    out: the new folder.
    base: folder or hub id of the base; unset: the one that the config names.
    task: a task's name, for the names of labels and metric.
    max_length: tokens that longer texts are cut at; unset: as our own export
      knew it, and for PEFT's own files as many as the model has room for.

  Returns:
    What adapter.json holds.

  Raises:
    UserError: naming what can't be carried, is missing or doesn't fit.
  """
  folder, out = local_copy(folder), check_free(out)
  settings = read_settings(folder)
  tensors, exported = read_tensors(folder / FILE)
  named = base or settings.base
  if base is None and str(exported.get("base")).startswith(PACKAGE):
    named = exported["base"]  # the config has its folder on some machine
  if named is None:
    raise UserError(
      f"{folder} names no base model, or a revision of one: say --base=FOLDER."
    )
  network = open_base(named, exported, head=settings.head).named_as(tensors)
  if settings.fan_in_fan_out and network.classifier.family.names.transposed:
    raise UserError(
      "fan_in_fan_out=True: the layers are Linear, where PEFT itself turns it"
      f" off; set it to false in {SETTINGS}."
    )

  # The tensors by what they are: of adapted layers, of all of them together, or
  # of a module that was saved whole.
  form = FORMS[settings.form]
  adapted: dict[str, Tensors] = {}
  root: Tensors = {}
  head: Leaves = {}
  for tensor, value in tensors.items():
    inner = tensor.removeprefix(PREFIX)
    module, _, last = inner.rpartition(".")
    path = network.path(module)
    endings = (*form.endings, *form.dropped)
    ending = next((e for e in endings if inner.endswith(f".{e}")), "")
    layer = inner.removesuffix(f".{ending}")
    if tensor in form.root:
      root[form.root[tensor]] = value
    elif ending in form.dropped and layer in network.layers:
      continue
    elif ending and layer in network.layers:
      leaf, value = form.take(ending, value, form.endings)
      adapted.setdefault(layer, {})[leaf] = value
    elif path[0] in network.saved_modules and last in HEAD_LEAVES:
      if last == "weight":
        last, value = (
          ("kernel", value.T) if value.ndim > 1 else ("scale", value)
        )
      head[(*path, last)] = value  # torch has (out, in)
    else:
      modules = (
        " and ".join(network.saved_modules) or "heads of classifiers, no other,"
      )
      raise UserError(
        f"The adapter's file holds {tensor!r}, which has no place here: only"
        f" {' and '.join({**form.root, **form.endings})} of the base's linear"
        f" layers, and whole {modules or 'heads of classifiers, no other,'}"
        " modules (modules_to_save), can be carried."
      )
  if not form.endings:  # then the config alone says which layers are adapted
    if settings.targets is None:
      raise UserError(f"{SETTINGS} names no target_modules.")
    heads = _head_paths(network.classifier)
    adapted = {
      name: {}
      for name, layer in network.layers.items()
      if is_target(settings, name) is not False
      and (*layer.path, "kernel") not in heads
    }
  _check_targets(settings, adapted, network)
  kinds = {network.layers[name].kind for name in adapted}
  for name, of_base in network.layers.items():
    if not form.endings and of_base.kind in kinds and name not in adapted:
      raise UserError(
        f"{SETTINGS} leaves out {name}, and {settings.method} has no numbers"
        " that would leave a layer as it is: all layers of a kind must be"
        f" adapted. {MERGE.capitalize()}."
      )

  # The method's settings as a run's config has them. Our own export knew the
  # learning rates and which seed gave the random matrices.
  known = exported.get("settings")
  if exported.get("method") != settings.method or not isinstance(known, dict):
    known = {}
  patterns = partial(target_patterns, layers=network.layers)
  values: dict[str, Any] = {
    "targets": patterns(kinds),
    **{rate: known[rate] for rate in ("lr", "head_lr") if rate in known},
    **settings.values,
    **form.more(adapted, network.layers, patterns),
  }
  adapter = make_adapter(settings.method, values)[0]
  leaves = _adapter_leaves(form, adapter, values, adapted, network)
  head, outputs, frozen = _complete_head(head, network)
  pair_digest = None
  if form.trained_root:
    leaves |= _root_leaves(adapter, root)
    root = {}
  parameters = {
    "adapter": sum(x.size for x in leaves.values()),
    "head": sum(x.size for x in head.values()),
    "frozen": frozen,
  }
  if adapter.shared is not None:
    targets = {
      layer.path: layer.target
      for name, layer in network.layers.items()
      if name in adapted
    }
    values, pair = find_projections(
      settings, values, root, targets=targets, known=known
    )
    pair_digest = digest(pair)
    if values.get("init") == STORED:
      leaves |= {("projections", name): matrix for name, matrix in pair.items()}

  run = _about_run(exported, task, outputs=outputs, base=network)
  if max_length is not None:
    run["max_length"] = max_length
  check_length(run["max_length"])
  about = {
    **run,
    "base": named,
    "base_fingerprint": network.fingerprint,
    "parameters": parameters,
    "method": settings.method,
    "projection_digest": pair_digest,
    "projection_prng": PRNG,
    "settings": values,
  }
  save_adapter(out, unflatten_dict({**leaves, **head}), about=about)
  return about


def _check_targets(
  settings: PeftSettings, adapted: Collection[str], base: Base
) -> None:
  """Raises a UserError where the file's layers are not those of the config."""
  if not adapted:
    raise UserError("The adapter's file holds no adapted layer.")
  head = _head_paths(base.classifier)
  for name in adapted:
    path = base.layers[name].path
    if (*path, "kernel") in head:
      raise UserError(
        f"{name} is part of the head, which is trained whole here; name"
        f" {path[0]} in modules_to_save instead of adapting it."
      )
  for name in base.layers:
    expected = is_target(settings, name)
    if expected is not None and expected != (name in adapted):
      raise UserError(
        f"target_modules {'names' if expected else 'leaves out'} {name}, but"
        f" the adapter's file has {'no' if expected else 'a'} tensor for it:"
        " the two files don't belong together, one is cut off, or the base is"
        " another."
      )


def _adapter_leaves(
  form: Form,
  adapter: Adapter,
  values: Mapping[str, Any],
  adapted: Mapping[str, Tensors],
  base: Base,
) -> Leaves:
  """The leaves of every layer of the adapted kinds, by path.

  Args:
    form: the form that PEFT has of the method.
    adapter: the method's.
    values: those of its settings.
    adapted: the leaves of the layers that PEFT has adapted, by name.
    base: the adapter's base.
  """
  # Without A and B: the leaves' shapes don't depend on them.
  adapter, unchanged = adapter._replace(shared=None), form.unchanged(values)
  kinds = {base.layers[name].kind for name in adapted}
  leaves: Leaves = {}
  for name, layer in base.layers.items():
    if layer.kind not in kinds:
      continue
    for leaf, need in leaf_shapes(adapter, layer.path, layer.target).items():
      if name not in adapted and leaf == "magnitude_m":
        path = (*layer.path, "kernel")
        kernel = load_params(
          base.folder, unflatten_dict({path: base.classifier.shapes[path]})
        ).params
        W0 = np.asarray(flatten_dict(kernel)[path], np.float32)
        value = np.linalg.norm(W0.reshape(layer.target.inputs, -1), axis=0)
      elif name not in adapted:
        value = np.full(need.shape, unchanged.get(leaf, 0), np.float32)
      elif leaf not in adapted[name]:
        raise UserError(f"The adapter's file lacks {leaf} of {name}.")
      else:
        value = adapted[name][leaf]
      if value.shape != need.shape:
        rank = f" and r = {values['rank']}" if "rank" in values else ""
        raise UserError(
          f"{leaf} of {name} has shape {value.shape}; the base{rank} need"
          f"{'' if rank else 's'} {need.shape}. Is it the right base?"
        )
      leaves[(*layer.path, leaf)] = value
  return leaves


def _root_leaves(adapter: Adapter, root: Tensors) -> Leaves:
  """The trained leaves that all layers share, by path."""
  common = adapter.common
  assert common is not None
  need = jax.eval_shape(lambda: common(jax.random.key(0), {}))
  for name, leaf in need.items():
    have = root[name].shape if name in root else None
    if have != leaf.shape:
      raise UserError(
        f"{name} has shape {have} in the adapter's file; its config needs"
        f" {leaf.shape}: the two files don't belong together."
      )
  return {(name,): root[name] for name in need}


def _head_paths(classifier: Blueprint) -> set[TreePath]:
  labels = classifier.label(unflatten_dict(classifier.shapes))
  return {p for p, label in flatten_dict(labels).items() if label == HEAD}


def _complete_head(head: Leaves, base: Base) -> tuple[Leaves, int, int]:
  """The head, its number of outputs, and how many numbers the rest holds.

  Args:
    head: whole modules in the adapter's file (modules_to_save); without any
      the adapter was trained with the base's own head.
    base: the adapter's base.
  """
  shapes = base.classifier.shapes
  if not _head_paths(base.classifier):  # words have no head of their own
    return {}, 0, sum(x.size for x in shapes.values())
  if not head:
    outputs = len(label_names(base.fields))
    made = blueprint(base.fields, outputs=outputs, scan=False)
    of_head = {path: made.shapes[path] for path in _head_paths(made)}
    loaded = load_params(base.folder, unflatten_dict(of_head))
    if loaded.missing:
      raise UserError(
        f"Neither the adapter (modules_to_save) nor {base.folder} has a"
        " classifier. Save the adapter with its head: task_type='SEQ_CLS'."
      )
    head = flatten_dict(loaded.params)
  *_, last = base.layers.values()  # it gives the logits
  kernel = head.get((*last.path, "kernel"))
  if kernel is None:
    raise UserError("The adapter's file has only part of a classifier.")
  outputs = kernel.shape[-1]
  shapes = blueprint(base.fields, outputs=outputs, scan=False).shapes
  modules = {path[0] for path in head}
  lacking = {path[0] for path in _head_paths(base.classifier)} - modules
  if lacking:
    raise UserError(
      f"The adapter's file lacks {' and '.join(sorted(lacking))}, a part of the"
      " head: name it in modules_to_save."
    )
  for path in sorted({*head, *(p for p in shapes if p[0] in modules)}):
    need = shapes[path].shape if path in shapes else None
    have = head[path].shape if path in head else None
    if need != have:
      raise UserError(
        f"The head's {'/'.join(path)} has shape {have} in the adapter and"
        f" {need} in the base's model. Is it the right base?"
      )
  frozen = sum(x.size for path, x in shapes.items() if path not in head)
  return head, outputs, frozen


def find_projections(
  settings: PeftSettings,
  values: dict[str, Any],
  saved: Tensors,
  *,
  targets: Mapping[TreePath, Target],
  known: Mapping[str, Any],
) -> tuple[dict[str, Any], Any]:
  """(settings that give the random matrices, and these).

  Args:
    settings: of PEFT's file.
    values: of our settings, by which PEFT's own key draws them.
    saved: the matrices as saved; empty where they were not.
    targets: the adapted layers.
    known: the settings that our own export wrote into the file, if it is one.

  Returns:
    With `projections.STORED` in place of an initialiser where no seed gives the
    saved matrices.

  Raises:
    UserError: the saved matrices are incomplete or don't fit the layers.
  """
  candidates = [values]
  names = FORMS[settings.form].root
  if settings.saved or saved:
    init, seed = known.get("init"), known.get("projection_seed")
    if init in INITIALISERS and isinstance(seed, int):
      candidates.insert(0, {**values, "init": init, "projection_seed": seed})
    if set(saved) != set(names.values()):
      raise UserError(
        f"save_projection is true, but the file lacks {' or '.join(names)}: it"
        " is cut off, or save_projection must be false."
      )
  for candidate in candidates:
    shared = make_adapter(settings.method, candidate)[0].shared
    assert shared is not None
    drawn = jax.tree.map(np.asarray, shared(targets))
    if not saved:
      return candidate, drawn
    # PEFT's may be made for wider layers: ours use the first columns
    cut = {
      name: matrix.reshape(len(matrix), -1)[: len(drawn[name])]
      for name, matrix in saved.items()
    }
    cut = {name: x[:, : drawn[name].shape[1]] for name, x in cut.items()}
    if any(cut[name].shape != drawn[name].shape for name in cut):
      shapes, need = (
        ", ".join(str(tree[name].shape) for name in cut)
        for tree in (saved, drawn)
      )
      raise UserError(
        f"{' and '.join(name.split('.')[-1] for name in names)} have shapes"
        f" {shapes}; the layers and r need {need}."
      )
    if all(np.array_equal(cut[name], drawn[name]) for name in cut):
      return candidate, drawn
  return {**values, "init": STORED}, cut


def _about_run(
  exported: Mapping[str, Any],
  task: str | None,
  *,
  outputs: int,
  base: Base,
) -> dict[str, Any]:
  """What is known of the run: from a named task, from our own export, or none.

  Without either, the labels' names are those of the base's config.json.
  """
  known = {name: x for name, x in exported.items() if x is not None}
  if task not in (None, known.get("task")):
    known = {name: known[name] for name in RUN if name in known}
  versions = results.provenance()["versions"]
  about = {"max_length": None, "versions": versions, **known}
  if task is not None:
    named = task_named(task)
    if KINDS[named.kind].head != base.head:
      raise UserError(
        f"The task {task} needs a head for {KINDS[named.kind].head}, but the"
        f" adapter has one for {base.head}: name another task, or none."
      )
    about |= {"task": task, "labels": list(named.labels), "kind": named.kind}
    about["score_name"] = named.score_name
  if base.head == KINDS[WORDS].head:
    return about | {"labels": [], "kind": WORDS}
  if not isinstance(about.get("labels"), list):
    names = label_names(base.fields)
    if len(names) != outputs:
      names = [f"LABEL_{i}" for i in range(outputs)]
    about["labels"] = names if outputs > 1 else []
  if (len(about["labels"]) or 1) != outputs:
    raise UserError(
      f"The head has {outputs} outputs, but the labels are"
      f" {', '.join(map(str, about['labels']))}."
    )
  problem = base.fields.get("problem_type")
  if problem and "kind" not in about:
    about["kind"] = kind_of_problem(problem) or problem
  kind_of(about, about["labels"])  # is one, and goes with the labels
  return about
