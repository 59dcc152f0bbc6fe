"""What a compiled program sends between chips, read from its HLO text.

Every collective with its bytes and how often a step runs it: one inside a loop
(a scanned stack's body) runs once per iteration. Bytes are those of one chip's
result, or, of a reduce-scatter, of its input. What runs beside other work is
written down several times, at its start, between and at its end, under one
channel: it counts once.
"""

import math
import re
from typing import NamedTuple

from experiments.plans.hlo import Run, arrays, runs, width

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# The chips of a group are listed, counted, or those along axes of a mesh.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_ALONG = re.compile(r"replica_groups=@?mesh\[([^\]]*)\] *\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")


class Collective(NamedTuple):
  """A collective of a step.

  Attributes:
    bytes: of one run of it, on one chip.
    times: how often a step runs it.
    looped: whether it is inside a loop.
    group: chips that take part; 0 where the text doesn't say.
  """

  kind: str
  types: tuple[str, ...]
  bytes: int
  times: int
  looped: bool
  group: int = 0

  @property
  def wire(self) -> float:
    """Bytes that a chip receives in a step, by the rings that send least."""
    if self.kind == "collective-permute" or not self.group:
      share = 1.0
    else:
      share = (self.group - 1) / self.group
    if self.kind == "all-reduce":  # every part is sent to be added, and back
      share *= 2
    return self.times * self.bytes * share


def collectives(text: str) -> list[Collective]:
  """All collectives of a module, in the order in which it runs them.

  Args:
    text: a compiled module's, as `compiled.as_text()` gives it.
  """
  by_channel: dict[str, Collective] = {}
  for number, run in enumerate(runs(text, whole=KINDS)):
    if run.operation.removesuffix("-start") not in KINDS:
      continue
    channel = _CHANNEL.search(run.rest)
    key = channel[0] if channel else f"the {number}th"
    by_channel.setdefault(key, _collective(run))
  return list(by_channel.values())


def _collective(run: Run) -> Collective:
  """The types and bytes come from the result's shape."""
  kind, group = run.operation.removesuffix("-start"), 0
  results = arrays(run.shape)
  # These two list their input, then their output (and a permutation also two
  # contexts).
  if run.operation == "all-gather-start":
    results = results[len(results) // 2 :]
  elif run.operation == "collective-permute-start":
    results = results[1:2]
  if listed := _LISTED.search(run.rest):
    group = len(listed[1].split(","))
  elif counted := _COUNTED.search(run.rest):
    group = int(counted[1])
  elif along := _ALONG.search(run.rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", along[1]))
    group = math.prod(int(sizes[x]) for x in re.findall(r"'(\w+)'", along[2]))
  size = sum(width(name) * math.prod(shape) for name, shape in results)
  if kind == "reduce-scatter":
    size *= group
  types = tuple(sorted({name for name, _ in results}))
  return Collective(kind, types, int(size), run.times, run.looped, group)
