"""Several methods on the same sites: `chain(lora(), magnitude())` is DoRA."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from vera_jax.adapters.interface import Adapter, Leaves, Path, Site
from vera_jax.adapters.products import adapted_site
from vera_jax.errors import UserError


def chain(*links: Adapter) -> Adapter:
  """The methods one after another: each adapts what those before it left.

  Raises:
    UserError: the same method twice, two methods with shared matrices, or a
      method that is known by its weights alone behind one that draws random
      numbers, which it would undo.
  """
  names = [link.name for link in links]
  if len(set(names)) < len(names) or len(links) < 2:
    raise UserError(
      f"A chain takes different methods, not {' + '.join(names)}."
    )
  if sum(link.shared is not None for link in links) > 1:
    raise UserError(
      f"Of {' + '.join(names)} more than one brings shared matrices."
    )
  drawn = [link.forward is not None for link in links]
  for number, link in enumerate(links):
    known = link.forward or link.low_rank
    if any(drawn[:number]) and link.weights is not None and not known:
      raise UserError(
        f"{link.name} can't follow {names[drawn.index(True)]}, which draws"
        " random numbers; name it first."
      )

  def start(key: Array, site: Site) -> dict[str, Array]:
    leaves: dict[str, Array] = {}
    for number, link in enumerate(links):
      if link.init is not None:
        own = link.init(jax.random.fold_in(key, number), site)
        leaves |= own
        site = adapted_site(link, own, site)
    return leaves

  def weights(leaves: Leaves, site: Site) -> tuple[Array, Array | None]:
    for link in links:
      site = adapted_site(link, link.own(leaves), site)
    return site.kernel(), site.bias

  def common(key: Array, sites: Mapping[Path, Site]) -> dict[str, Array]:
    found: dict[str, Any] = {}
    for number, link in enumerate(links):
      if link.common is not None:
        found |= link.common(jax.random.fold_in(key, number), sites)
    return found

  def prepare(leaves: Leaves, site: Site) -> Leaves:
    prepared: dict[str, Array] = {}
    for link in links:
      assert link.prepare is not None
      own = link.own(leaves)
      prepared |= link.prepare(own, site)
      site = adapted_site(link, own, site)
    return prepared

  trained = [link.trains for link in links if link.trains is not None]
  return Adapter(
    name="+".join(names),
    init=start,
    weights=weights,
    shared=next((x.shared for x in links if x.shared is not None), None),
    common=common,
    trains="|".join(trained) or None,
    prepare=prepare if all(link.prepare for link in links) else None,
    links=links,
  )
