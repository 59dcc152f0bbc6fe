"""An nnx model's adapter as a folder, and as LoRA for what knows LoRA alone.

The folder is the package's own: `adapter.json` and `adapter.safetensors`, with
every check that `Adapted.save` and `load` make.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters import saved, summary
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.interface import EMPTY
from vera_jax.adapters.labels import label_tree, split
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.products import exact_factors
from vera_jax.adapters.sites import (
  all_sites,
  map_sites,
  own_leaves,
)
from vera_jax.errors import UserError
from vera_jax.nnx.adapt import (
  adapt,
  adaptation_of,
  modules_of,
  named,
  projections_of,
  remove,
  tree_of,
)
from vera_jax.nnx.layers import Projection, lora_shapes


def save(
  folder: str | Path, model: nnx.Module, *, about: Mapping[str, Any] = EMPTY
) -> None:
  """Write the adapter of a model, with all that loading it must check.

  Args:
    folder: of the adapter; files that are there are replaced.
    model: with an adapter on it.
    about: further facts for adapter.json and the model card.

  Raises:
    UserError: the model has no adapter, or the folder can't be written.
  """
  adaptation, params = adaptation_of(model), _params(model)
  labels = label_tree(params, adaptation.adapter, head="")
  variables = {"params": params, "projections": projections_of(model)}
  saved.save(adaptation, folder, split(params, labels)[0], variables, about)


def load(
  folder: str | Path, model: nnx.Module, *, projections: str = "made"
) -> nnx.Module:
  """Put a saved adapter on a model, which is changed and returned.

  Args:
    folder: from `save`, or of a linen model whose parameters have the same
      names.
    model: without an adapter, with the weights that it was trained on.
    projections: as for `adapt`; those that lie in the file are always held.

  Raises:
    UserError: a file is damaged; or the layers, the weights or the projections
      are not those that were saved.
  """
  file = load_adapter(folder)
  about = file.about
  adapter, targets = make_adapter(about["method"], about["settings"])
  adapt(
    model,
    saved.take_stored(file, adapter)[1],
    targets=targets,
    fused=about.get("fused", EMPTY),
    projections="held" if saved.is_stored(about) else projections,
  )
  try:
    _set_leaves(model, folder)
  except Exception:
    remove(model)  # the model is given back as it came
    raise
  return model


def _set_leaves(model: nnx.Module, folder: str | Path) -> None:
  """The file's leaves in place of the first ones, with every check."""
  adaptation = adaptation_of(model)
  adapter = adaptation.adapter
  base = {
    path: leaf
    for path, leaf in flatten_dict(_params(model)).items()
    if not adapter.owns(path[-1])
  }
  variables = {"params": unflatten_dict(base)}
  shapes = jax.eval_shape(lambda: variables)["params"]
  loaded = saved.load(
    adaptation, folder, variables, lambda: (adaptation.sites, shapes)
  )
  leaves = flatten_dict(loaded["params"])
  for path, module in modules_of(model).items():
    for name, variable in vars(module).items():
      if isinstance(variable, nnx.LoRAParam):
        variable.set_value(leaves[*path, name])


def table(model: nnx.Module) -> str:
  """A table of the adapted layers, their kinds, kernels and trained numbers.

  Raises:
    UserError: the model has no adapter.
  """
  adaptation = adaptation_of(model)
  adapter = adaptation.adapter
  flat = flatten_dict(_params(model))
  base = {
    path: leaf for path, leaf in flat.items() if not adapter.owns(path[-1])
  }
  return summary.table(adaptation, adaptation.sites, unflatten_dict(base), {})


def to_lora(model: nnx.Module) -> Any:  # an `nnx.State`
  """The adapter as LoRA with alpha = r, exactly, under qwix's names.

  `kernel_lora_a` and `kernel_lora_b` are what samplers take that know LoRA
  alone. A layer's rank is r, or the smaller of its widths where r is larger.

  Raises:
    UserError: the adapted weights are not the kernel and a low-rank delta, or
      parts of a kernel are adapted.
  """
  adaptation, params = adaptation_of(model), _params(model)
  adapter, sites = adaptation.adapter, adaptation.sites
  low_rank = adapter.low_rank
  if low_rank is None:
    raise UserError(
      f"{adapter.name} is more than a low-rank delta, and so no LoRA: merge it."
    )
  if parts := [path for path, site in sites.items() if site.columns]:
    raise UserError(f"{'/'.join(parts[0])} is a part of a kernel: merge it.")
  projections = projections_of(model)
  with jax.default_matmul_precision("highest"):
    on_weights = all_sites(adapter, sites, params, projections)
    factors = map_sites(
      lambda site, leaves: exact_factors(low_rank(leaves, site)),
      on_weights,
      projections,
      own_leaves(adapter, on_weights, params),
    )
  lora = {}
  paths = {named(path): path for path, _ in nnx.iter_modules(model)}
  modules = modules_of(model)
  for path, pair in factors.items():
    kernel, stack = sites[path].view.kernel, sites[path].stack
    ins, outs = lora_shapes(modules[path])
    for letter, matrix, shape in (
      ("a", pair[0], (*stack, *ins, -1)),
      ("b", pair[1], (*stack, pair[1].shape[-2], *outs)),
    ):
      value = nnx.LoRAParam(matrix.reshape(shape))
      lora[*paths[path], f"{kernel}_lora_{letter}"] = value
  return nnx.from_flat_state(list(lora.items()))


def _params(model: nnx.Module) -> dict[str, Any]:
  """The model's parameters and the adapter's leaves, without projections."""
  return tree_of(model, without=Projection)
