"""An nnx model's adapter as a folder, and as LoRA for what knows LoRA alone.

The folder is the package's own: `adapter.json` and `adapter.safetensors`, with
every check that `Adapted.save` and `load` make. That of a model whose linen
twin is here is the twin's.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters import saved, summary
from vera_jax.adapters.files import SavedAdapter, load_adapter
from vera_jax.adapters.interface import EMPTY
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.labels import label_tree, split
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.products import exact_factors
from vera_jax.adapters.sites import all_sites, map_sites, own_leaves
from vera_jax.adapters.stored_pair import is_stored, take_stored
from vera_jax.errors import UserError
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import fingerprint, load_params, read_model
from vera_jax.models.kinds import KINDS, WORDS
from vera_jax.nnx.adapt import (
  PARAMS,
  adapt,
  adaptation_of,
  modules_of,
  projections_of,
  remove,
  set_values,
  stacked,
  tree_of,
)
from vera_jax.nnx.layers import Seen, see
from vera_jax.nnx.twins import twin_of
from vera_jax.operations.precision import exact
from vera_jax.operations.quantised import plain
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import find_base


def save(
  folder: str | Path,
  model: nnx.Module,
  *,
  base: str | Path | None = None,
  about: Mapping[str, Any] = EMPTY,
) -> None:
  """Write the adapter of a model, with all that loading it must check.

  Args:
    folder: of the adapter; files that are there are replaced.
    model: with an adapter on it.
    base: of a model whose linen twin is here, such as tunix's Llama, the folder
      in Hugging Face's layout, hub id or GGUF file that its weights are from.
      With it the file is one for all commands, such as `generate`.
    about: further facts for adapter.json and the model card; of a chat model
      trained here, "template" and "max_length".

  Raises:
    UserError: the model has no adapter, its weights or layers are not those of
      the base, or the folder can't be written.
  """
  adaptation, params = adaptation_of(model), _params(model)
  adapter, targets = adaptation.adapter, adaptation.targets
  trained, frozen = split(params, label_tree(params, adapter, head=""))
  named = None
  if base is not None:
    named_folder = resolve(base)
    weights = _check_weights(named_folder, model, flatten_dict(frozen).keys())
    of_base = blueprint(
      read_model(named_folder),
      outputs=1,
      head=KINDS[WORDS].head,
      adapter=(adapter, targets),
      scan=False,
    )
    if other := of_base.targets.keys() ^ adaptation.sites.keys():
      names = ["/".join(path) for path in sorted(other)]
      raise UserError(
        f"The targets {', '.join(targets)} match other layers of the model than"
        f" of {named_folder}: {saved.some(names)} in one of them alone. Save"
        " without `base`, or train with targets that name layers of both."
      )
    named, about = (str(base), weights), {"kind": WORDS, **about}
  variables = {"params": params, "projections": projections_of(model)}
  saved.save(adaptation, folder, trained, variables, about, base=named)


def load(
  folder: str | Path,
  model: nnx.Module,
  *,
  base: str | Path | None = None,
  projections: str = "made",
  stack_axis: int | None = None,
) -> nnx.Module:
  """Put a saved adapter on a model, which is changed and returned.

  Args:
    folder: from `save`, or of a linen model whose parameters have the same
      names, or of the model's linen twin.
    model: without an adapter, with the weights that it was trained on.
    base: where the file names the twin's base: its folder, hub id or GGUF file,
      if that is elsewhere now.
    projections: as for `adapt`; those that lie in the file are always held.
    stack_axis: as for `adapt`.

  Raises:
    UserError: a file is damaged; or the layers, the weights or the projections
      are not those that were saved.
  """
  file = load_adapter(folder)
  about = file.about
  adapter, targets = make_adapter(about["method"], about["settings"])
  adapt(
    model,
    take_stored(file, adapter)[1],
    targets=targets,
    fused=about.get("fused", EMPTY),
    projections="held" if is_stored(about) else projections,
    stack_axis=stack_axis,
  )
  try:
    _set_leaves(model, file, base)
  except Exception:
    remove(model)  # the model is given back as it came
    raise
  return model


def _set_leaves(
  model: nnx.Module, file: SavedAdapter, base: str | Path | None
) -> None:
  """The file's leaves in place of the first ones, with every check."""
  adaptation, twin = adaptation_of(model), twin_of(model)
  base_leaves, weights = _base(model), None
  if file.about.get("codes_digest"):
    raise UserError(
      f"{file.folder} was trained on a base in {file.about['quantise']} codes,"
      " which are other weights than the model's."
    )
  if file.about["base"] is not None:
    frozen = {
      p for p, x in base_leaves.items() if not saved.is_held(file, p, x)
    }
    weights = _check_weights(find_base(file, base), model, frozen)
  params = unflatten_dict(base_leaves)
  loaded = saved.load(
    adaptation,
    file.folder,
    {"params": params},
    lambda: (twin.sites(adaptation.sites), params),
    base_fingerprint=weights,
  )
  leaves = flatten_dict(loaded["params"])
  first = flatten_dict(tree_of(model, nnx.LoRAParam))
  set_values(
    model,
    {
      path: jax.device_put(
        twin.value(path, leaves, leaf.shape), getattr(leaf, "sharding", None)
      )
      for path, leaf in first.items()
    },
  )


def _check_weights(
  folder: Path, model: nnx.Module, frozen: Collection[TreePath]
) -> str:
  """The fingerprint of a folder whose weights the model has.

  Raises:
    UserError: it has others, or no linen twin that the folder could be of.
  """
  kind = type(model).__name__
  if not twin_of(model).modules:
    raise UserError(
      f"{folder} is the base of a linen model, which {kind} has no table of"
      " names for (vera_jax/nnx/twins.py)."
    )
  leaves = {path: plain(leaf) for path, leaf in _base(model).items()}
  loaded = load_params(folder, jax.eval_shape(lambda: unflatten_dict(leaves)))
  values = flatten_dict(loaded.params)
  other = [*loaded.missing, *loaded.unexpected]
  for path in frozen & values.keys():
    if not np.array_equal(values[path], np.asarray(leaves[path])):
      other.append("/".join(path))
  if other:
    raise UserError(
      f"This {kind} does not have the weights of {folder}: other or missing are"
      f" {saved.some(other)}. Name the base that they are from."
    )
  return fingerprint(folder)


def _base(model: nnx.Module) -> dict[TreePath, Any]:
  """The base's leaves by path, as the file has them."""
  owns = adaptation_of(model).adapter.owns
  leaves = flatten_dict(_params(model))
  return {path: leaf for path, leaf in leaves.items() if not owns(path[-1])}


def table(model: nnx.Module) -> str:
  """A table of the adapted layers, their kinds, kernels and trained numbers.

  Raises:
    UserError: the model has no adapter.
  """
  adaptation = adaptation_of(model)
  sites = twin_of(model).sites(adaptation.sites)
  return summary.table(adaptation, sites, unflatten_dict(_base(model)), {})


def to_lora(model: nnx.Module) -> nnx.State[Any, Any]:
  """The adapter as LoRA with alpha = r, exactly, under qwix's names.

  `kernel_lora_a` and `kernel_lora_b` are what samplers take that know LoRA
  alone. A layer's rank is r, or the smaller of its widths where r is larger.

  Raises:
    UserError: the adapted weights are not the kernel and a low-rank delta, or
      parts of a kernel are adapted.
  """
  adapter, sites = adaptation_of(model).adapter, adaptation_of(model).sites
  params, projections = tree_of(model, PARAMS), projections_of(model)
  low_rank = adapter.low_rank
  if low_rank is None:
    raise UserError(
      f"{adapter.name} is more than a low-rank delta, and so no LoRA: merge it."
    )
  if parts := [path for path, site in sites.items() if site.columns]:
    raise UserError(f"{'/'.join(parts[0])} is a part of a kernel: merge it.")
  with exact():
    on_weights = all_sites(adapter, sites, params, projections)
    factors = map_sites(
      lambda site, leaves: exact_factors(low_rank(leaves, site)),
      on_weights,
      projections,
      own_leaves(adapter, on_weights, params),
    )
  plain = nnx.clone(model)
  modules = modules_of(remove(plain))
  for path, (down, up) in factors.items():
    site, module = sites[path], modules[path]
    seen = see(module, type(module), site.axis)
    assert isinstance(seen, Seen)
    for letter, matrix, shape in (
      ("a", down, (*site.stack, *seen.inputs, -1)),
      ("b", up, (*site.stack, up.shape[-2], *seen.outputs)),
    ):
      value = nnx.LoRAParam(stacked(matrix.reshape(shape), site))
      setattr(module, f"{site.view.kernel}_lora_{letter}", value)
  return nnx.state(plain, nnx.LoRAParam)


def _params(model: nnx.Module) -> dict[str, Any]:
  """Parameters and the adapter's leaves, without projections, as a file has
  them: of a model whose linen twin is here, the twin's."""
  flat = flatten_dict(tree_of(model, PARAMS))
  return unflatten_dict(twin_of(model).tree(flat))
