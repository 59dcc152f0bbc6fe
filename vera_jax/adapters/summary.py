"""A table of what an adapter trains, and where: `Adapted.summary`."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flax.core import meta
from flax.traverse_util import flatten_dict

from vera_jax.adapters.counting import plans_at
from vera_jax.adapters.interface import Path, Target
from vera_jax.adapters.labels import ADAPTER, join, label_tree
from vera_jax.adapters.saved import Identified, identity, own_shapes
from vera_jax.adapters.sites import count_layers
from vera_jax.adapters.targets import trace_sites

if TYPE_CHECKING:
  from vera_jax.adapters.apply import Adapted

TITLES = ("layer", "kind", "kernel", "plan", "trained numbers")


def summary(
  adapted: "Adapted", args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
  """What `Adapted.summary` returns."""
  adapter, model = adapted.adapter, adapted.model
  targets = adapted.find_targets(*args, **kwargs) if adapted.targets else {}
  _, calls, variables = trace_sites(
    model, adapted.targets, *args, fused=adapted.fused, **kwargs
  )
  plans = plans_at(
    adapter,
    targets,
    {path: calls[path].tokens for path in targets},
    plan=adapted.plan,
    forwards=adapted.forwards,
  )
  return table(adapted, targets, meta.unbox(variables["params"]), plans)


def table(
  adapted: Identified,
  targets: Mapping[Path, Target],
  base: Mapping[str, Any],
  plans: Mapping[Path, str],
) -> str:
  """The table of an adapter on a model.

  Args:
    adapted: what the adapter is.
    targets: its sites.
    base: the model's parameters or their shapes, without the adapter's.
    plans: the plan at each site, where it is known.
  """
  adapter = adapted.adapter
  params = join(base, own_shapes(adapter, targets, base)[0])
  sizes = {p: math.prod(x.shape) for p, x in flatten_dict(params).items()}
  labels = flatten_dict(label_tree(params, adapter, head=""))
  trained: Counter[Path] = Counter()
  for path, size in sizes.items():
    if labels[path] == ADAPTER:
      trained[path[:-1]] += size
  rows = [TITLES]
  for path in dict.fromkeys((*targets, *sorted(trained))):
    kind = kernel = ""
    if (target := targets.get(path)) is not None:
      shape = (*target.stack, target.inputs, target.outputs)
      kind, kernel = target.view.kind, " × ".join(map(str, shape))
    name = "/".join(path) or "(of all layers)"
    rows.append((name, kind, kernel, plans.get(path, ""), f"{trained[path]:,}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for *texts, number in rows:
    cells = [text.ljust(n) for text, n in zip(texts, widths, strict=False)]
    lines.append("  ".join([*cells, number.rjust(widths[-1])]))
  lines.insert(1, "  ".join("-" * n for n in widths))
  total = sum(math.prod(leaf.shape) for leaf in flatten_dict(base).values())
  on = f", on {count_layers(targets)}" if targets else ""
  lines.append(
    f"{identity(adapted)['method']} trains {trained.total():,} numbers,"
    f" {trained.total() / total:.2%} of the model's {total:,}{on}."
  )
  return "\n".join(lines)
