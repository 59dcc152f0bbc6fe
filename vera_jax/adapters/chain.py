"""Several methods on the same network: `chain(lora(), magnitude())` is DoRA."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import Array

from vera_jax.adapters.adapted_product import adapted_site
from vera_jax.adapters.base_leaves import ALL
from vera_jax.adapters.interface import Adapter, Leaves, Path, Site, Target
from vera_jax.adapters.sites import is_on
from vera_jax.errors import UserError


def chain(*methods: Adapter) -> Adapter:
  """The methods one after another: each adapts what those before it left.

  A method that is `on` certain sites leaves the chain's others alone.

  Raises:
    UserError: the same method twice, two methods with shared matrices, a method
      that has no part in a chain because it adapts nothing or leaves nothing to
      adapt, or one that is known by its weights alone behind one that draws
      random numbers, which it would undo.
  """
  links = tuple(
    link._replace(on=link.on or method.on)
    for method in methods
    for link in method.methods
  )
  _check(links)

  def at(site: Site) -> Iterator[tuple[int, Adapter]]:
    """The links that are on the site, each with its number."""
    return (x for x in enumerate(links) if is_on(x[1], site.path))

  def start(key: Array, site: Site) -> dict[str, Array]:
    leaves: dict[str, Array] = {}
    for number, link in at(site):
      if link.init is not None:
        first = link.init(jax.random.fold_in(key, number), site)
        leaves |= first
        site = adapted_site(link, first, site)
    return leaves

  def weights(leaves: Leaves, site: Site) -> tuple[Array, Array | None]:
    for _, link in at(site):
      site = adapted_site(link, link.own(leaves), site)
    return site.kernel(), site.bias

  def of_link(link: Adapter, sites: Mapping[Path, Any]) -> Mapping[Path, Any]:
    return {path: site for path, site in sites.items() if is_on(link, path)}

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for link in links:
      if link.shared is not None:
        made |= link.shared(of_link(link, sites))
    return made

  def common(key: Array, sites: Mapping[Path, Site]) -> dict[str, Array]:
    made: dict[str, Any] = {}
    for number, link in enumerate(links):
      if link.common is not None:
        link_key = jax.random.fold_in(key, number)
        made |= link.common(link_key, of_link(link, sites))
    return made

  def prepare(leaves: Leaves, site: Site) -> Leaves:
    prepared: dict[str, Array] = {}
    for _, link in at(site):
      assert link.prepare is not None
      link_leaves = link.own(leaves)
      prepared |= link.prepare(link_leaves, site)
      site = adapted_site(link, link_leaves, site)
    return prepared

  trained = [link.trains for link in links if link.trains is not None]
  return Adapter(
    name="+".join(link.name for link in links),
    init=start,
    weights=weights,
    shared=shared if any(link.shared for link in links) else None,
    from_base=any(link.from_base for link in links),
    common=common,
    trains="|".join(trained) or None,
    prepare=prepare if all(link.prepare for link in links) else None,
    links=links,
    parts=tuple(
      part._replace(on=part.on or method.on)
      for method in methods
      for part in (() if method.method else method.parts) or (method,)
    ),
  )


def _check(links: Sequence[Adapter]) -> None:
  """Raises a UserError for methods that make no chain, as `chain` says."""
  names = [link.name for link in links]
  if len(set(names)) < len(names) or len(links) < 2:
    raise UserError(
      f"A chain takes different methods, not {' + '.join(names)}."
    )
  for link in links:
    if link.trains == ALL:
      raise UserError(
        f"{link.name} trains every weight, which leaves nothing for a chain to"
        " add; use it alone."
      )
    if link.weights is None and link.trains is None:
      raise UserError(
        f"{link.name} adds nothing to a chain; leave it out. A head is trained"
        " with every method."
      )
  if sum(link.shared is not None for link in links) > 1:
    raise UserError(
      f"Of {' + '.join(names)} more than one brings shared matrices."
    )
  drawn = [link.is_random for link in links]
  for number, link in enumerate(links):
    known = link.forward or link.low_rank
    if any(drawn[:number]) and link.weights is not None and not known:
      raise UserError(
        f"{link.name} can't follow {names[drawn.index(True)]}, which draws"
        " random numbers; name it first."
      )
