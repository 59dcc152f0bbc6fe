"""nnx models whose linen twin is here, by one table of names per pair.

Their layers have the twin's paths, which also say the random numbers of each
layer, and their files the twin's leaves. So whatever reads an adapter here
takes one that was trained on the nnx model, and the other way round. A model is
known by the name of its class, and its library is not imported.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.interface import Adapter, Path, Site, Target, View
from vera_jax.adapters.sites import all_sites, map_sites, own_leaves
from vera_jax.errors import UserError
from vera_jax.nnx.layers import QWIX, UNADAPTED
from vera_jax.operations.quantised import plain

ROWS, COLUMNS, TURNED = "rows", "columns", "turned"
LAYOUTS: dict[str, Callable[[Any], Any]] = {
  ROWS: lambda leaf: leaf.reshape(len(leaf), -1),
  COLUMNS: lambda leaf: leaf.reshape(-1, leaf.shape[-1]),
  TURNED: lambda leaf: leaf.T,
}


class Twin(NamedTuple):
  """The table of a pair.

  Attributes:
    modules: beginnings of the nnx model's paths, and what they are in the twin.
    leaves: whole paths of leaves, when the modules have the twin's; what they
      are in the twin; and where heads are apart, whether the first axis makes
      the kernel's ROWS or the last one its COLUMNS, or that it is TURNED.
  """

  modules: tuple[tuple[str, str], ...] = ()
  leaves: tuple[tuple[str, str, str], ...] = ()

  def module(self, path: Path) -> Path:
    """The twin's path of a module."""
    name = "/".join(path)
    for own, twin in self.modules:
      name = re.sub(rf"^{own}(?=/|$)", twin, name)
    return tuple(name.split("/")) if path else path

  def leaf(self, path: Path) -> tuple[Path, str]:
    """The twin's path of a leaf, whose module has the twin's path already, and
    its layout; an adapter's own leaves have the same in both."""
    for own, twin, layout in self.leaves:
      if match := re.fullmatch(own, "/".join(path)):
        return tuple(match.expand(twin).split("/")), layout
    return path, ""

  def tree(self, flat: Mapping[Path, Any]) -> dict[Path, Any]:
    """The twin's leaves, by path, of a model's."""
    leaves = {}
    for own, value in flat.items():
      path, layout = self.leaf(own)
      value = LAYOUTS[layout](plain(value)) if layout else value
      leaves[path] = value
    return leaves

  def value(self, own: Path, leaves: Mapping[Path, Any], shape: Any) -> Any:
    """A model's leaf of a shape, out of its twin's leaves."""
    path, layout = self.leaf(own)
    return leaves[path].T if layout == TURNED else leaves[path].reshape(shape)

  def sites(self, sites: Mapping[Path, Target]) -> Mapping[Path, Target]:
    """The sites on the twin's leaves, which are matrices."""
    seen = {}
    for path, site in sites.items():
      leaf, layout = self.leaf((*path, site.view.kernel))
      axes = (1, 0) if layout == TURNED else ()
      seen[path] = site._replace(view=View(kernel=leaf[-1], axes=axes))
    return seen if self.modules else sites


DECODER = Twin(
  modules=(
    ("embedder", "embeddings/embed_tokens"),
    (r"layers_(\d+)", r"encoder/layer_\1"),
    (r"encoder/layer_(\d+)/attn", r"encoder/layer_\1/self_attn"),
    ("final_norm", "encoder/norm"),
  ),
  leaves=(
    ("(.*)/input_embedding", r"\1/embedding", ""),
    ("lm_head/w", "lm_head/embedding", TURNED),
    ("(.*norm)/w", r"\1/scale", ""),
    ("(.*/o_proj)/w", r"\1/kernel", COLUMNS),
    ("(.*/[qkv]_proj)/w", r"\1/kernel", ROWS),
    ("(.*)/([qkv])_bias", r"\1/\2_proj/bias", ""),
  ),
)
TWINS = {
  "tunix.models.llama3.model.Llama3": DECODER,
  "tunix.models.qwen2.model.Qwen2": DECODER,
  "tunix.models.qwen3.model.Qwen3": DECODER,
}


def twin_of(model: nnx.Module) -> Twin:
  """The table of a model, empty where it has no twin, as a mixture of experts;
  such a model is its own."""
  experts = getattr(getattr(model, "config", None), "num_experts", None)
  derived = {UNADAPTED, QWIX}  # from the model's class, by us and by qwix
  kind = next(x for x in type(model).__mro__ if not derived & vars(x).keys())
  name = f"{kind.__module__}.{kind.__qualname__}"
  return Twin() if experts else TWINS.get(name, Twin())


def check_biases(
  twin: Twin,
  adapter: Adapter,
  sites: Mapping[Path, Target],
  params: Mapping[str, Any],
  leaves: Mapping[str, Any],
  projections: Mapping[str, Any],
) -> None:
  """Refuse a method that would change biases which the nnx model adds itself,
  outside of the layers: it would be another function than the twin's.

  Args:
    twin, adapter, sites: as `adapt` has them.
    params, leaves, projections: the model's, and the adapter's.
  """
  of_twin = twin.sites(sites) if twin.modules else {}
  weights = adapter.weights
  if weights is None or not of_twin:
    return

  def check(site: Site, own: Any) -> None:
    if weights(own, site)[1] is not site.bias:
      raise UserError(
        f"{adapter.name} scales the bias of {'/'.join(site.path)}, which this"
        " model adds outside of the layer, where it is not adapted. Leave the"
        " layer out of the targets."
      )

  def on_shapes(flat: Any, leaves: Any, projections: Any) -> None:
    params = unflatten_dict(twin.tree(flat) | flatten_dict(leaves))
    all_of_twin = all_sites(adapter, of_twin, params, projections)
    own = own_leaves(adapter, all_of_twin, params)
    map_sites(check, all_of_twin, projections, own)

  jax.eval_shape(on_shapes, flatten_dict(params), leaves, projections)
