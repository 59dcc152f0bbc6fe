"""XLA's counts of a deep network, from two shallow ones.

XLA counts a loop's body once, however often the loop runs. So the counts of a
scanned stack are those of two layers, unrolled, and for each further layer what
a third one adds to them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

UNROLLED = 2, 3  # layers of the programs that are counted


def counts(
  config: ConfigDict,
  fields: Mapping[str, Any],
  compile: Callable[[ConfigDict, Mapping[str, Any]], Any],
) -> dict[str, float]:
  """FLOPs and bytes moved per step, for all layers that `fields` has.

  Args:
    config: a run's.
    fields: of config.json.
    compile: the program of a config and an architecture.
  """
  short = config.copy_and_resolve_references()
  with short.ignore_type():  # it may be "auto"
    short.model.scan = False
  first, second = (
    compile(short, {**fields, "num_hidden_layers": layers}).cost_analysis()
    for layers in UNROLLED
  )
  further = fields["num_hidden_layers"] - UNROLLED[0]
  return {
    name: first[key] + further * (second[key] - first[key])
    for name, key in (("flops", "flops"), ("moved", "bytes accessed"))
  }
