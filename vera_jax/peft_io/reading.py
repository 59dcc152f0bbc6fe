"""PEFT's adapter folder -> ours.

The names in PEFT's file say which layers are adapted; its config says which
should be, and the two must agree. Layers of a kind that PEFT left out
(`layers_to_transform`) get the adapter that changes nothing: b, or LoRA's B, is
0, IA3's scales are 1 and DoRA's m is the norm of W0.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax import results
from vera_jax.adapters.apply import leaf_shapes
from vera_jax.adapters.files import STORED, check_length, save_adapter
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.labels import HEAD
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.projections import (
  INITIALISERS,
  PRNG,
  digest,
  make_pair,
)
from vera_jax.errors import UserError
from vera_jax.hub import PACKAGE
from vera_jax.models.family import label_names
from vera_jax.models.hf_weights import load_params
from vera_jax.models.kinds import KINDS, WORDS
from vera_jax.models.pretrained import Blueprint, blueprint
from vera_jax.peft_io.base import Base, open_base, target_patterns
from vera_jax.peft_io.settings import FILE as SETTINGS
from vera_jax.peft_io.settings import PeftSettings, is_target, read_settings
from vera_jax.peft_io.tensors import (
  FILE,
  LEAVES,
  PAIR,
  PREFIX,
  Tensors,
  check_free,
  read_tensors,
)
from vera_jax.tasks.task import task_named

# What adapter.json says of the run, and PEFT's own files don't.
RUN = (
  "task",
  "seed",
  "labels",
  "kind",
  "columns",
  "score_name",
  "score",
  "max_length",
  "image_size",
  "versions",
)
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
  """Write a PEFT adapter (VeRA, LoRA, DoRA or IA3) as ours.

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
  check_free(out)
  settings = read_settings(folder)
  tensors, exported = read_tensors(folder / FILE)
  name = base or settings.base
  if base is None and str(exported.get("base")).startswith(PACKAGE):
    name = exported["base"]  # the config has its folder on some machine
  if name is None:
    raise UserError(
      f"{folder} names no base model, or a revision of one: say --base=FOLDER."
    )
  network = open_base(name, exported, head=settings.head).named_as(tensors)
  if settings.fan_in_fan_out and network.classifier.family.names.transposed:
    raise UserError(
      "fan_in_fan_out=True: the layers are Linear, where PEFT itself turns it"
      f" off; set it to false in {SETTINGS}."
    )

  # The tensors by what they are: of adapted layers, of VeRA's A and B, or of a
  # module that was saved whole.
  endings = LEAVES[settings.method]
  adapted: dict[str, Tensors] = {}
  pair: Tensors = {}
  head: Leaves = {}
  for tensor, value in tensors.items():
    inner = tensor.removeprefix(PREFIX)
    module, _, last = inner.rpartition(".")
    path = network.path(module)
    ending = next((e for e in endings if inner.endswith(f".{e}")), "")
    layer = inner.removesuffix(f".{ending}")
    if settings.method == "vera" and tensor in PAIR:
      pair[PAIR[tensor]] = value
    elif ending and layer in network.layers:
      leaf = endings[ending]
      if leaf == "ia3_out":  # one row scales a layer's inputs
        leaf = "ia3_in" if value.shape[:1] == (1,) else leaf
        value = value.reshape(-1)
      adapted.setdefault(layer, {})[leaf] = value
    elif path[0] in network.whole and last in HEAD_LEAVES:
      if last == "weight":
        last, value = (
          ("kernel", value.T) if value.ndim > 1 else ("scale", value)
        )
      head[(*path, last)] = value  # torch has (out, in)
    else:
      whole = " and ".join(network.whole) or "heads of classifiers, no other,"
      raise UserError(
        f"The adapter's file holds {tensor!r}, which has no place here: only"
        f" {' and '.join(endings)} of the base's linear layers, and whole"
        f" {whole} modules (modules_to_save), can be carried."
      )
  _check_targets(settings, adapted, network)

  # The method's settings as a run's config has them. Our own export knew the
  # learning rates and which seed gave A and B.
  known = exported.get("settings")
  if exported.get("method") != settings.method or not isinstance(known, dict):
    known = {}
  kinds = {network.layers[layer].kind for layer in adapted}
  given: dict[str, Any] = {
    "targets": target_patterns(kinds, network.layers),
    "lr": known.get("lr"),
    "head_lr": known.get("head_lr"),
  }
  if settings.method == "ia3":
    scaled = [layer for layer in adapted if "ia3_in" in adapted[layer]]
    kinds = {network.layers[layer].kind for layer in scaled}
    given["feedforward"] = target_patterns(kinds, network.layers)
  else:
    given["rank"] = settings.rank
  if settings.method in ("lora", "dora"):
    given["alpha"] = settings.alpha
  elif settings.method == "vera":
    given |= {"d_init": settings.d_init, "sharing": "shared", "train": "both"}
    given |= {"init": "peft", "projection_seed": settings.key}
  leaves = _adapter_leaves(settings, given, adapted, network)
  head, outputs, frozen = _complete_head(head, network)
  parameters = {
    "adapter": sum(x.size for x in leaves.values()),
    "head": sum(x.size for x in head.values()),
    "frozen": frozen,
  }
  pair_digest = None
  if settings.method == "vera":
    targets = [network.layers[layer].target for layer in adapted]
    init, seed, pair = find_projections(
      settings,
      pair,
      inputs=max(target.inputs for target in targets),
      outputs=max(target.outputs for target in targets),
      known=known,
    )
    given |= {"init": init, "projection_seed": seed}
    pair_digest = digest(pair)
    if init == STORED:
      leaves |= {("projections", name): matrix for name, matrix in pair.items()}

  run = _about_run(exported, task, outputs=outputs, base=network)
  if max_length is not None:
    run["max_length"] = max_length
  check_length(run["max_length"])
  about = {
    **run,
    "base": name,
    "base_fingerprint": network.fingerprint,
    "parameters": parameters,
    "method": settings.method,
    "projection_digest": pair_digest,
    "projection_prng": PRNG,
    "settings": given,
  }
  save_adapter(out, unflatten_dict({**leaves, **head}), about=about)
  return about


def _check_targets(
  settings: PeftSettings, found: Collection[str], base: Base
) -> None:
  """Raises a UserError where the file's layers are not those of the config."""
  if not found:
    raise UserError("The adapter's file holds no adapted layer.")
  head = _head_paths(base.classifier)
  for name in found:
    path = base.layers[name].path
    if (*path, "kernel") in head:
      raise UserError(
        f"{name} is part of the head, which is trained whole here; name"
        f" {path[0]} in modules_to_save instead of adapting it."
      )
  for name in base.layers:
    expected = is_target(settings, name)
    if expected is not None and expected != (name in found):
      raise UserError(
        f"target_modules {'names' if expected else 'leaves out'} {name}, but"
        f" the adapter's file has {'no' if expected else 'a'} tensor for it:"
        " the two files don't belong together, one is cut off, or the base is"
        " another."
      )


def _adapter_leaves(
  settings: PeftSettings,
  given: Mapping[str, Any],
  adapted: Mapping[str, Tensors],
  base: Base,
) -> Leaves:
  """The leaves of every layer of the adapted kinds, by path."""
  # Without A and B: the leaves' shapes don't depend on them.
  adapter = make_adapter(settings.method, given)[0]._replace(shared=None)
  kinds = {base.layers[name].kind for name in adapted}
  unchanged = {"vera_d": settings.d_init, "ia3_in": 1, "ia3_out": 1}
  leaves: Leaves = {}
  for name, layer in base.layers.items():
    if layer.kind not in kinds:
      continue
    for leaf, need in leaf_shapes(adapter, layer.path, layer.target).items():
      if name not in adapted and leaf == "magnitude_m":
        place = (*layer.path, "kernel")
        kernel = load_params(
          base.folder, unflatten_dict({place: base.classifier.shapes[place]})
        ).params
        W0 = np.asarray(flatten_dict(kernel)[place], np.float32)
        value = np.linalg.norm(W0.reshape(layer.target.inputs, -1), axis=0)
      elif name not in adapted:
        value = np.full(need.shape, unchanged.get(leaf, 0), np.float32)
      elif leaf not in adapted[name]:
        raise UserError(f"The adapter's file lacks {leaf} of {name}.")
      else:
        value = adapted[name][leaf]
      if value.shape != need.shape:
        rank = f" and r = {settings.rank}" if settings.rank else ""
        raise UserError(
          f"{leaf} of {name} has shape {value.shape}; the base{rank} need"
          f"{'' if rank else 's'} {need.shape}. Is it the right base?"
        )
      leaves[(*layer.path, leaf)] = value
  return leaves


def _head_paths(classifier: Blueprint) -> set[TreePath]:
  labels = classifier.label(unflatten_dict(classifier.shapes))
  return {p for p, label in flatten_dict(labels).items() if label == HEAD}


def _complete_head(head: Leaves, base: Base) -> tuple[Leaves, int, int]:
  """The head, its number of outputs, and how many numbers the rest holds.

  Args:
    head: whole modules in the adapter's file (modules_to_save); without any
      the adapter was trained with the base's own head.
    base: of the adapter.
  """
  shapes = base.classifier.shapes
  if not _head_paths(base.classifier):  # words have no head of their own
    return {}, 0, sum(x.size for x in shapes.values())
  if not head:
    outputs = len(label_names(base.fields))
    made = blueprint(base.fields, outputs=outputs, scan=False)
    own = {path: made.shapes[path] for path in _head_paths(made)}
    loaded = load_params(base.folder, unflatten_dict(own))
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
  pair: Tensors,
  *,
  inputs: int,
  outputs: int,
  known: Mapping[str, Any],
) -> tuple[str, int, Tensors]:
  """A and B, with the initialiser and the seed that give them.

  Args:
    settings: of the adapter.
    pair: A and B as saved; empty where they were not.
    inputs, outputs: the largest widths of the adapted layers.
    known: the settings that our own export wrote into the file, if it is one.

  Returns:
    `files.STORED` in place of an initialiser where no seed gives the saved
    pair.

  Raises:
    UserError: the saved pair is incomplete or doesn't fit the layers.
  """
  rank = settings.rank
  candidates = [("peft", settings.key)]
  init, seed = known.get("init"), known.get("projection_seed")
  if init in INITIALISERS and isinstance(seed, int):
    candidates.insert(0, (str(init), seed))
  saved: Tensors | None = None
  if settings.saved or pair:
    if set(pair) != {"A", "B"}:
      raise UserError(
        "save_projection is true, but the file lacks base_model.vera_A or"
        " base_model.vera_B: it is cut off, or save_projection must be false."
      )
    # PEFT's pair may be wider than the layers, which use its first columns
    saved = {"A": pair["A"][:, :inputs], "B": pair["B"][:outputs]}
    need = {"A": (rank, inputs), "B": (outputs, rank)}
    if any(saved[k].shape != need[k] for k in "AB"):
      raise UserError(
        f"vera_A and vera_B have shapes {pair['A'].shape}, {pair['B'].shape};"
        f" the layers and r need {need['A']}, {need['B']}."
      )
  else:
    candidates = candidates[-1:]  # PEFT's key is all that the folder says
  for init, seed in candidates:
    made = make_pair(rank, inputs, outputs, init=init, seed=seed)
    drawn = {name: np.asarray(matrix) for name, matrix in made.items()}
    if saved is None or all(np.array_equal(saved[k], drawn[k]) for k in "AB"):
      return init, seed, drawn
  assert saved is not None
  return STORED, settings.key, saved


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
  about: dict[str, Any] = dict.fromkeys(RUN)
  if not base.reads_images:
    del about["image_size"]
  about["versions"] = results.provenance()["versions"]
  about |= {name: exported[name] for name in RUN if name in exported}
  if task is not None:
    named = task_named(task)
    about |= {"task": task, "labels": list(named.labels)}
    about["score_name"] = named.score_name
  if base.head == KINDS[WORDS].head:
    return about | {"labels": [], "kind": WORDS}
  if not isinstance(about["labels"], list):
    names = label_names(base.fields)
    if len(names) != outputs:
      names = [f"LABEL_{i}" for i in range(outputs)]
    about["labels"] = names if outputs > 1 else []
  if (len(about["labels"]) or 1) != outputs:
    raise UserError(
      f"The head has {outputs} outputs, but the labels are"
      f" {', '.join(map(str, about['labels']))}."
    )
  return about
