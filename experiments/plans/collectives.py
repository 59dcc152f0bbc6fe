"""What a compiled program sends between chips, read from its HLO text.

Every collective with its bytes and how often a step runs it: one inside a loop
(a scanned stack's body) runs once per iteration. Bytes are those of one chip's
result, or, of a reduce-scatter, of its input.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5}  # others say their bits: bf16, s32
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s*(?:ROOT )?%?[\w.\-]+ = "
  r"(?P<shape>.*?) (?P<operation>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_CALLED = re.compile(
  r"(?:body|condition|calls|to_apply|true_computation|false_computation"
  r"|branch_computations)=(\{[^}]*\}|[%\w.\-]+)"
)
_ITERATIONS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
# The chips of a group are either listed or counted.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")


class Collective(NamedTuple):
  """A collective of a step.

  Attributes:
    bytes: of one run of it, on one chip.
    times: how often a step runs it.
    looped: whether it is inside a loop.
  """

  kind: str
  types: tuple[str, ...]
  bytes: int
  times: int
  looped: bool


def collectives(text: str) -> list[Collective]:
  """All collectives of a module, in the order in which it runs them.

  Args:
    text: a compiled module's, as `compiled.as_text()` gives it.
  """
  bodies: dict[str, list[re.Match[str]]] = {}
  entry, current = "", []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = bodies.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif match := _INSTRUCTION.match(line):
      current.append(match)

  def walk(name: str, times: int, looped: bool) -> Iterator[Collective]:
    for match in bodies.get(name, []):
      operation, rest = match["operation"], match["rest"]
      if operation.removesuffix("-start") in KINDS:
        types, size = _sent(match["shape"], operation, rest)
        kind = operation.removesuffix("-start")
        yield Collective(kind, types, size, times, looped)
        continue  # what it calls is the addition
      loops = operation == "while"
      known = _ITERATIONS.search(rest) if loops else None
      runs = times * int(known[1]) if known else times
      for called in _CALLED.findall(rest):
        for computation in re.findall(r"[\w.\-]+", called):
          yield from walk(computation, runs, looped or loops)

  return list(walk(entry, 1, False))


def _sent(shape: str, operation: str, rest: str) -> tuple[tuple[str, ...], int]:
  """(element types, bytes) of a collective, from its result's shape."""
  arrays = []
  for name, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape)):
    count = math.prod(int(size) for size in sizes.split(",") if size)
    bits = re.match(r"[a-z]+(\d+)", name)  # a token has none
    width = _WIDTHS.get(name, int(bits[1]) / 8 if bits else 0)
    arrays.append((name, count * width))
  # These two list their input, then their output (and a permutation also two
  # contexts).
  if operation == "all-gather-start":
    arrays = arrays[len(arrays) // 2 :]
  elif operation == "collective-permute-start":
    arrays = arrays[1:2]
  size = sum(width for _, width in arrays)
  if operation.startswith("reduce-scatter"):
    if listed := _LISTED.search(rest):
      size *= len(listed[1].split(","))
    elif counted := _COUNTED.search(rest):
      size *= int(counted[1])
  return tuple(sorted({name for name, _ in arrays})), int(size)
