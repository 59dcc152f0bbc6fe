"""Sweeps: a base config and a list of overrides, from products and zips.

  product({"vera.rank": (16, 64), "seed": (0, 1)})     # all four
  zipped({"task": ("rte", "cola"), "optim.epochs": (5, 6)})    # the two pairs
  cross(zipped(...), product(...))      # each of the one with each of the other

Overrides are dicts by flat key of a run's config. Lists of them are added with
`+`. The same run twice is one run.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import open_choices

Overrides = list[dict[str, Any]]
SEEDS = open_choices.SEEDS.value  # the paper's five (section 4.1)
FEWER = range(3)  # of the small variants


def product(choices: Mapping[str, Iterable[Any]]) -> Overrides:
  """Every combination; the last key changes fastest."""
  values = itertools.product(*choices.values())
  return [dict(zip(choices, row, strict=True)) for row in values]


def zipped(columns: Mapping[str, Sequence[Any]]) -> Overrides:
  """The first of each column, the second of each, and so on; equal lengths."""
  rows = zip(*columns.values(), strict=True)
  return [dict(zip(columns, row, strict=True)) for row in rows]


def cross(*lists: Overrides) -> Overrides:
  """Each override of one list with each of the others; later keys win."""
  return [
    {key: x for part in parts for key, x in part.items()}
    for parts in itertools.product(*lists)
  ]


def seeds(numbers: Iterable[int]) -> Overrides:
  return product({"seed": numbers})


def difference(base: ConfigDict, other: ConfigDict) -> dict[str, Any]:
  """The overrides that turn one config into the other."""
  ours, theirs = (flatten_dict(c.to_dict(), sep=".") for c in (base, other))
  return {k: x for k, x in theirs.items() if k not in ours or x != ours[k]}


def sweep(
  title: str, base: ConfigDict, overrides: Overrides, *, paper: str = ""
) -> ConfigDict:
  """What a sweep's `get_config` returns.

  Args:
    title: of its tables and figures.
    base: a run's config.
    overrides: one dict per run, by flat key.
    paper: the model whose published numbers stand beside ours, if it is not the
      one that is trained: "roberta-base" or "roberta-large".
  """
  config = ConfigDict({"title": title, "paper": paper, "members": 8})
  config.base = base
  # as pairs, for a ConfigDict takes no keys with dots
  config.overrides = tuple(tuple(one.items()) for one in overrides)
  return config
