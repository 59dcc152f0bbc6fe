"""Put an adapter on any linen model, from outside.

`adapt(model, adapter, targets=...)` is a linen module with the model's own
parameter tree, plus the adapter's leaves beside each adapted kernel and the
`projections` collection. The model's code is left alone: the calls of its
layers are intercepted by path.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict

from vera_jax.adapters import saved
from vera_jax.adapters.intercept import KEYS, Interception
from vera_jax.adapters.interface import (
  EMPTY,
  Adapter,
  Path,
  Target,
)
from vera_jax.adapters.labels import join
from vera_jax.adapters.layer_calls import IN_MODEL
from vera_jax.adapters.merge import merge
from vera_jax.adapters.plans import AUTO, Split, check_plan
from vera_jax.adapters.sites import (
  EVERY,
  Fused,
  first_leaves,
  is_on,
  make_shared,
  matches,
)
from vera_jax.adapters.summary import summary
from vera_jax.adapters.targets import trace_sites
from vera_jax.adapters.tracing import init_shapes
from vera_jax.errors import UserError


class Adapted(nn.Module):
  """A model and the adapter on it; made by `adapt`.

  Attributes:
    model, adapter, targets, fused, plan, forwards: as `adapt` has them.
    splits: how a mesh divides the products of the sites that it divides.
  """

  model: nn.Module
  adapter: Adapter
  targets: tuple[str, ...]
  fused: Fused
  plan: str
  forwards: int
  splits: Mapping[Path, Split] = FrozenDict()

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    if self.is_initializing():  # `init` below has no need of this call
      raise UserError(
        "An adapted module can't be initialised inside another module: the"
        " adapter's leaves are made on a whole model's weights. Adapt the outer"
        " module instead: adapt(outer, adapter, targets=...)."
      )
    assert self.scope is not None
    # in this scope itself, so that the base keeps its parameters' names, of
    # which one may be that of the field
    self.scope.reservations.pop("model", None)
    self.scope.flags = self.scope.flags.copy({IN_MODEL: True})
    model = self.model.clone(parent=self.scope, name=None, _deep_clone=True)
    layer_calls = Interception(
      self.adapter,
      self.targets,
      self.fused,
      self.plan,
      self.forwards,
      self.variables,
      self.has_rng(KEYS),
      self.splits,
    )
    with nn.intercept_methods(layer_calls):
      return model(*args, **kwargs)

  @nn.nowrap
  def find_targets(self, *args: Any, **kwargs: Any) -> dict[Path, Target]:
    """The sites that the adapter is on, by path.

    Raises:
      UserError: as for `find_targets`, or a pattern that one of the adapter's
        methods has (`on`, IA3's `feedforward`) matches none of the targets, or
        a target is one of none of a chain's methods.
    """
    targets = find_targets(
      self.model, self.targets, *args, fused=self.fused, **kwargs
    )
    check_links(self.adapter, targets)
    return targets

  @nn.nowrap
  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """As `nn.Module.init`, with the adapter's leaves among the `params` and
    the collection `projections`, made on the model's own first weights."""
    variables = self.model.init(rngs, *args, **kwargs)
    key = rngs["params"] if isinstance(rngs, Mapping) else rngs
    return self.init_on(variables, key, *args, **kwargs)

  @nn.nowrap
  def init_on(
    self, variables: Mapping[str, Any], key: Any, *args: Any, **kwargs: Any
  ) -> Any:
    """The model's variables with the adapter's leaves, made on these weights.

    DoRA's magnitude, for one, is that of the kernels, so that it starts as the
    model only on the weights that it was made on.

    Args:
      variables: the model's own, such as `{"params": pretrained}`.
      key: of the leaves' random numbers.
      *args: example inputs, as for `init`.
      **kwargs: keyword arguments of the model's call.

    Returns:
      A dictionary of the same collections, with the leaves among its `params`,
      and of `projections`, where the method has some.

    Raises:
      UserError: a target matches nothing, or its weights are not there.
    """
    targets = self.find_targets(*args, **kwargs) if self.targets else {}
    params = variables["params"]
    projections = make_shared(self.adapter, targets, params)
    leaves = first_leaves(self.adapter, targets, params, projections, key)
    collection = {"projections": projections} if projections else {}
    return {**variables, "params": join(params, leaves), **collection}

  @nn.nowrap
  def save(
    self,
    folder: str | FilePath,
    trainable: Mapping[str, Any],
    variables: Mapping[str, Any],
    *,
    about: Mapping[str, Any] = EMPTY,
  ) -> None:
    """Write the trained leaves, with all that loading them must check.

    Args:
      folder: of the adapter; files that are there are replaced.
      trainable: the trained leaves: those of the adapter and of the head, the
        first tree that `split` returns.
      variables: from `init_on` or `init`, or with trained leaves in place of
        the first ones. The file gets the fingerprint of those that are not
        trained, and the digest of the projections.
      about: further facts for adapter.json and the model card, such as
        {"task": "rare birds", "score": 0.9, "score_name": "accuracy"}.

    Raises:
      UserError: these are no such trees, or the folder can't be written.
    """
    saved.save(self, folder, trainable, variables, about)

  @nn.nowrap
  def load(
    self,
    folder: str | FilePath,
    variables: Mapping[str, Any],
    *args: Any,
    **kwargs: Any,
  ) -> dict[str, Any]:
    """The variables with a saved adapter on them.

    Args:
      folder: from `save`, or its id on the hub, as for `load_adapter`.
      variables: the model's own, such as `{"params": pretrained}`. What the
        file holds of the model, such as a head, may be missing.
      *args: example inputs, as for `init_on`.
      **kwargs: keyword arguments of the model's call.

    Returns:
      What `init_on` returns, with the trained leaves in place of first ones.

    Raises:
      UserError: a file is damaged; or the method, its settings, the layers, the
        weights or the projections are not those that were saved.
    """

    def model() -> tuple[dict[Path, Target], Any]:
      targets = self.find_targets(*args, **kwargs) if self.targets else {}
      return targets, init_shapes(self.model, *args, **kwargs)["params"]

    return saved.load(self, folder, variables, model)

  @nn.nowrap
  def summary(self, *args: Any, **kwargs: Any) -> str:
    """A table of the adapted layers: their kinds, kernels, plans and trained
    numbers, from shapes alone. Print it.

    Args:
      *args: example inputs, as for `init_on`.
      **kwargs: keyword arguments of the model's call.
    """
    return summary(self, args, kwargs)

  @nn.nowrap
  def merge(
    self, variables: Mapping[str, Any], *args: Any, **kwargs: Any
  ) -> dict[str, Any]:
    """The plain model's variables, with the adapted weights in place of its
    own; see `merge.merge`.

    Args:
      variables: with the adapter's leaves and projections.
      *args: example inputs, as for `init_on`.
      **kwargs: keyword arguments of the model's call.
    """
    merged = merge(
      variables["params"],
      variables.get("projections", EMPTY),
      adapter=self.adapter,
      targets=self.find_targets(*args, **kwargs) if self.targets else {},
    )
    rest = {k: x for k, x in variables.items() if k != "projections"}
    return {**rest, "params": merged}

  @nn.nowrap
  def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """(output, variables): as `nn.Module.init_with_output`, by `init`."""
    variables = self.init(rngs, *args, **kwargs)
    keys = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}
    output, _ = self.apply(variables, *args, rngs=keys, mutable=True, **kwargs)
    return output, variables


def adapt(
  model: nn.Module,
  adapter: Adapter,
  *,
  targets: Sequence[str],
  fused: Fused = EMPTY,
  plan: str = AUTO,
  forwards: int = 1,
) -> Adapted:
  """Wrap a linen model, unchanged, with an adapter at the matching layers.

  The result is used as the model is; its `init`, or `init_on` with pretrained
  weights, adds the adapter's leaves and the `projections` collection. Its
  output equals the model's until the adapter is trained.

  Args:
    model: any linen module, unbound.
    adapter: from `vera`, `lora`, ...
    targets: patterns as in `find_targets`.
    fused: parts of fused kernels, which targets may then name: by a layer's
      pattern, each part's first and last column by name.
    plan: how low-rank deltas are multiplied, a name in `products.PLANS`, or
      "auto": the cheapest for each shape.
    forwards: how often a training step runs the forward pass; 2 under remat.

  Raises:
    UserError: one of these is something else, or no targets are named.
  """
  _check_model(model)
  check_choices(adapter, targets)
  fixed: Any = FrozenDict({key: dict(parts) for key, parts in fused.items()})
  return Adapted(
    model, adapter, tuple(targets), fixed, check_plan(plan), forwards
  )


def check_choices(adapter: Adapter, targets: Sequence[str]) -> None:
  """Raises a UserError for what is no adapter, or no targets for it."""
  if not isinstance(adapter, Adapter):
    raise UserError(
      f"The adapter is {adapter!r}; give what a method's function returns, such"
      " as vera(rank=256)."
    )
  listed = isinstance(targets, Sequence) and not isinstance(targets, str)
  if not listed or not all(isinstance(pattern, str) for pattern in targets):
    raise UserError(f"targets is {targets!r}; give a list of patterns.")
  on_layers = any(link.init or link.weights for link in adapter.methods)
  if on_layers and not targets:
    raise UserError(
      f"targets is empty, but {adapter.name} is put on layers: name some, or"
      f" all that can be adapted by [{EVERY!r}]."
    )
  if targets and not on_layers:
    raise UserError(
      f"{adapter.name} trains leaves of the base and is put on no layers, but"
      f" targets is {targets!r}: give []."
    )


def _check_model(model: Any) -> None:
  """Raises a UserError for what is no unbound linen module."""
  what = f"The model is {model!r}"
  if isinstance(model, type):
    what = f"The model is the class {model.__name__}"
    if issubclass(model, nn.Module):
      raise UserError(f"{what}; give a module of it: {model.__name__}(...).")
  elif any(x.__module__.startswith("flax.nnx") for x in type(model).__mro__):
    raise UserError(
      f"The model is the nnx module {type(model).__name__}: vera_jax.nnx.adapt"
      " puts adapters on those."
    )
  if not isinstance(model, nn.Module):
    raise UserError(f"{what}; give a module of flax.linen.")
  if isinstance(model, Adapted):  # of two calls one would be passed by
    raise UserError(
      f"The model has an adapter already, {model.adapter.name}: put both on at"
      " once, by chain(first, second)."
    )
  if model.scope is not None:
    raise UserError(
      f"The model, a {type(model).__name__}, is bound to variables, or lies in"
      " another module. Give it unbound (model.unbind() has it), or adapt the"
      " outermost module."
    )


def check_links(adapter: Adapter, targets: Mapping[Path, Target]) -> None:
  """Raises a UserError for a pattern of a method that is none of the targets,
  or a target that none of a chain's methods is on."""
  for link in adapter.methods:
    for pattern in (*link.on, *link.apart):
      if not any(matches(pattern, path) for path in targets):
        raise UserError(
          f"{link.name} names {pattern!r}, which is none of the targets:"
          f" {_listed(targets)}."
        )
  idle = [p for p in targets if not _has_method(adapter, p)]
  if idle:
    raise UserError(
      f"None of the methods of {adapter.name} is on the targets"
      f" {_listed(idle)}: name them in a method's `on`, or leave them out."
    )


def _listed(paths: Iterable[Path]) -> str:
  return ", ".join("/".join(path) for path in paths)


def _has_method(adapter: Adapter, path: Path) -> bool:
  """Whether one of the adapter's methods is on the site."""
  return any(
    is_on(link, path)
    for link in adapter.methods
    if link.init or link.weights or adapter.links == ()
  )


def find_targets(
  model: nn.Module,
  patterns: Sequence[str],
  *args: Any,
  fused: Fused = EMPTY,
  **kwargs: Any,
) -> dict[Path, Target]:
  """The sites whose path ends in one of the patterns.

  Args:
    model: any linen module, unbound.
    patterns: regular expressions over "/"-joined paths; "query" matches every
      path that ends in the name `query`.
    *args: example inputs (arrays or `jax.ShapeDtypeStruct`); nothing is
      computed on them.
    fused: as in `adapt`.
    **kwargs: keyword arguments of the model's call.

  Raises:
    UserError: a pattern matches no site; the message lists those there are.
  """
  _check_model(model)
  return trace_sites(model, patterns, *args, fused=fused, **kwargs)[0]
