"""What an adapter method is: a few pure functions over sites.

A site is one product `x @ kernel + bias` of the network. A method says which
leaves it trains there and which weights they turn the site's own into: that is
its definition, which merging uses. Whatever computes the same product faster
or with randomness beside it is optional. `apply.adapt` puts a method on any
linen model, `merge.merge` folds it into the kernels, `chain.chain` puts several
on one site, and none of them knows which method it holds.
"""

import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Float

from vera_jax.adapters.structured import Structured

Path = tuple[str, ...]
Leaves = Mapping[str, Any]  # arrays, or `Structured` among what is shared
Matrix = Float[Array, "_ _"] | Structured
Kernel = Float[Array, "*stack i o"]
Bias = Float[Array, "... _"]  # no names: sites of all widths share a dict
EMPTY: Mapping[str, Any] = MappingProxyType({})
# The orders in which a low-rank delta is multiplied out (`products.py`).
PLANS = ("factored", "folded", "folded_forward")


class View(NamedTuple):
  """How a layer's kernel is seen as a matrix (i, o), by its kind (`layers.py`).

  Attributes:
    kind: the layer's class.
    kernel: the name of its parameter.
    axes: the kernel's own axes, those that make i before those that make o; ()
      where they lie so.
    taps: how many equal blocks of inputs the rows of the matrix are: the
      positions of a convolution's window, or 1.
    groups: parts of the inputs of which each output sees one.
    looked_up: whether x are row numbers, so that no product is made.
    forms: whether the layer multiplies x with matrices in full alone, so that
      one that is structured is formed first.
    plans: the plans that the layer allows.
    in_scope: whether the kernel lies in another module's scope, which several
      may share (`nn.share_scope`). A site's path is then the scope's with the
      layer's name behind it.
  """

  kind: str = "Dense"
  kernel: str = "kernel"
  axes: tuple[int, ...] = ()
  taps: int = 1
  groups: int = 1
  looked_up: bool = False
  forms: bool = False
  plans: tuple[str, ...] = PLANS
  in_scope: bool = False

  @property
  def takes_vectors(self) -> bool:
    """Whether the layer's x is (*t, i): what a row of the matrix is scaled by
    may then as well scale x."""
    return self.taps == 1 and self.groups == 1 and not self.looked_up


MATRIX = View()  # `nn.Dense`'s, and of what is stored as a matrix


class Target(NamedTuple):
  """What is known of a site before there are weights.

  Attributes:
    inputs, outputs: its flat widths i and o.
    stack: () for a layer of its own and (layers,) under `nn.scan`, where one
      parameter holds all layers.
    columns: (first, last) where the site is a part of a fused kernel, such as
      the query's third of GPT-2's `c_attn`. Its path is then the layer's path
      with the part's name behind it.
    view: of the layer's kernel.
    axis: of the parameters, on which an nnx model stacks its layers; linen's
      and all that a method is given have the stack in front.
  """

  inputs: int
  outputs: int
  stack: tuple[int, ...] = ()
  columns: tuple[int, int] | None = None
  view: View = MATRIX
  axis: int = 0

  @property
  def layers(self) -> int:
    return math.prod(self.stack)


class Site(NamedTuple):
  """One product of the network, as a method sees it.

  Attributes:
    path: where its leaves lie in the parameter tree.
    inputs, outputs: i and o.
    kernel: makes the kernel (i, o) on demand: dequantised, and as the methods
      before this one in a chain left it.
    bias: (o,), or None where the layer has none.
    shared: what the method's `shared` made for this site and for all.
    common: the method's trained leaves at the tree's root.
    stack: () inside a method's functions, except in `shared`, whose sites have
      the stack's axes in front of kernel and bias.
    view: of the layer's kernel.
    project: (x, matrix (i, n)) -> (*t, n): x times any matrix, as the layer
      multiplies; a convolution with n outputs, say. Of a layer that does not
      allow the factored plan it may not be used.
    multiply: (x, kernel (i, o)) -> (*t, o): the layer's own product, and the
      same with a part of the columns where the layer allows to factor.
    dtype: of the kernel when it is multiplied with; None for x's.
    rows: of x, all t of them; None for those that x has.
  """

  path: Path
  inputs: int
  outputs: int
  kernel: Callable[[], Kernel]
  bias: Bias | None = None
  shared: Leaves = EMPTY
  common: Leaves = EMPTY
  stack: tuple[int, ...] = ()
  view: View = MATRIX
  project: Callable[[Array, Matrix], Array] = operator.matmul
  multiply: Callable[[Array, Array], Array] = operator.matmul
  dtype: Any = None
  rows: int | None = None


def as_they_are(leaves: Leaves, site: Site) -> Leaves:
  """The `prepare` of methods whose products need no kernel per row."""
  del site
  return leaves


class LowRank(NamedTuple):
  """delta = down @ diag(inner) @ up @ diag(outer), added to a kernel.

  Attributes:
    down: (i, r), an array or `Structured`.
    up: (r, o), likewise.
    inner, outer: (r,) and (o,); None counts as 1.
    trains_down, trains_up: whether these are trained, or only scaled by
      trained vectors: the gradient of one that is costs a product.
  """

  down: Matrix
  up: Matrix
  inner: Float[Array, " _"] | None = None
  outer: Float[Array, " _"] | None = None
  trains_down: bool = False
  trains_up: bool = False


class Adapter(NamedTuple):
  """An adapter method.

  Attributes:
    name: every leaf's name starts with it and an underscore.
    init: (key, site) -> the site's trained leaves. They may depend on the
      kernel, which is why they are made on the loaded weights.
    weights: (leaves, site) -> (kernel, bias), adapted: the definition.
    shared: sites by path, or their widths alone where no weights are asked for,
      -> the non-trainable `projections` collection. Arrays at its root serve
      every site; those at a site's path serve that site and carry its stack's
      axes.
    from_base: whether all that `shared` makes comes from the kernels. Then the
      base's fingerprint stands for it, and a file keeps no digest of it: the
      last bits of a decomposition differ from device to device.
    common: (key, sites by path) -> trained leaves at the root of the tree.
    trains: a pattern over the paths of base leaves that are trained themselves.
    low_rank: (leaves, site) -> `LowRank`, where weights = kernel + delta; then
      `products` has three orders of multiplication to choose from.
    product: (leaves, site, x) -> x times the delta, by two thin products: the
      factored plan. Without it `products.thin_products` of `low_rank` is taken.
    forward: (leaves, site, x, key, inner) -> (y, penalty): for randomness in
      training. `inner(x)` is the product so far; with None for the key, y is
      x times `weights`, and `low_rank` computes it where that is there. The
      penalty, a number or None, is added to the mean loss. Where the layer's
      x is no vector (`View.takes_vectors`), only `inner` and `site.project`
      may be given it. None for the pair means: as `weights` say.
    draws: whether `forward` draws random numbers.
    prepare: (leaves, site) -> leaves, once when a bank takes an adapter in,
      so that a row's product needs no kernel of its own. Without it a bank
      refuses the method.
    links: the methods of a chain, in order; () for a single method.
    on: patterns of the sites that a link of a chain is on; () for all sites of
      the chain.
    apart: patterns of the sites that the method treats in another way, each of
      which has to match one.
    method, settings: the name and the settings by which the table of methods
      makes it again, which is what an adapter's file holds; "" and None of an
      adapter that the table can't make.
    parts: what a chain was made of, in order; a part may be a chain itself.
  """

  name: str
  init: Callable[[Array, Site], dict[str, Array]] | None = None
  weights: Callable[[Leaves, Site], tuple[Array, Array | None]] | None = None
  shared: Callable[[Mapping[Path, Target | Site]], dict[str, Any]] | None = None
  from_base: bool = False
  common: Callable[[Array, Mapping[Path, Site]], dict[str, Array]] | None = None
  trains: str | None = None
  low_rank: Callable[[Leaves, Site], LowRank] | None = None
  product: Callable[[Leaves, Site, Array], Array] | None = None
  forward: Callable[..., tuple[Array, Array | None] | None] | None = None
  draws: bool = True
  prepare: Callable[[Leaves, Site], Leaves] | None = None
  links: tuple["Adapter", ...] = ()
  on: tuple[str, ...] = ()
  apart: tuple[str, ...] = ()
  method: str = ""
  settings: Any = None
  parts: tuple["Adapter", ...] = ()

  @property
  def methods(self) -> tuple["Adapter", ...]:
    """The links of a chain, or the method itself."""
    return self.links or (self,)

  @property
  def is_random(self) -> bool:
    """Whether products in training are more than the weights say."""
    return any(one.forward is not None and one.draws for one in self.methods)

  def owns(self, name: str) -> bool:
    """Whether a leaf of this name is the method's."""
    return any(name.startswith(f"{link.name}_") for link in self.methods)

  def own(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the leaves that are the method's."""
    return {name: leaf for name, leaf in leaves.items() if self.owns(name)}
