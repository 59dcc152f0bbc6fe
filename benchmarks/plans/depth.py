"""XLA's counts of a deep network, from two shallow ones.

XLA counts a loop's body once, whatever the turns. So the counts of a scanned
stack are those of two layers, unrolled, and for each further one what a third
adds to them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vera_jax.models.bert import BertConfig

UNROLLED = 2, 3  # layers of the programs that are counted


def counts(
  config: ConfigDict,
  fields: BertConfig,
  compile: Callable[[ConfigDict, BertConfig], Any],
) -> dict[str, float]:
  """FLOPs and bytes moved of a step, for `fields.num_hidden_layers` layers.

  Args:
    compile: the program of a config and an architecture.
  """
  short = config.copy_and_resolve_references()
  short.model.scan = False
  few, more = (
    compile(short, dataclasses.replace(fields, num_hidden_layers=layers))
    for layers in UNROLLED
  )
  further = fields.num_hidden_layers - UNROLLED[0]
  first, second = few.cost_analysis(), more.cost_analysis()
  return {
    name: first[key] + further * (second[key] - first[key])
    for name, key in (("flops", "flops"), ("moved", "bytes accessed"))
  }
