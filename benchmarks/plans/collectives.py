"""What a compiled program sends between chips, read from its HLO text.

Every collective with its bytes and how often a step runs it: one inside a loop
(a scanned stack's body) runs once a turn. Bytes are those of one chip's result,
or, of a reduce-scatter, of what goes in.
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
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+)$")
_CALLED = re.compile(
  r"(body|condition|calls|to_apply|true_computation|false_computation)="
  r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


class Collective(NamedTuple):
  """A collective of a step.

  Attributes:
    bytes: of one run of it, on one chip.
    times: runs a step.
    looped: whether it is inside a loop.
  """

  kind: str
  types: tuple[str, ...]
  bytes: int
  times: int
  looped: bool


def collectives(text: str) -> list[Collective]:
  """All of a module's, in the order of the text.

  Args:
    text: a compiled module's, as `compiled.as_text()` gives it.
  """
  bodies, entry = _computations(text)
  found: list[Collective] = []
  _walk(entry, bodies, times=1, looped=False, found=found)
  return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The instructions of every computation, and the entry's name."""
  bodies: dict[str, list[str]] = {}
  entry, current = "", []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = bodies.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif match := _INSTRUCTION.match(line):
      current.append(match[2])
  return bodies, entry


def _walk(
  name: str,
  bodies: dict[str, list[str]],
  *,
  times: int,
  looped: bool,
  found: list[Collective],
) -> None:
  for text in bodies.get(name, []):
    shape, kind = _operation(text)
    base = kind.removesuffix("-start")
    if base in KINDS:
      found.append(_collective(base, shape, text, times, looped))
      continue  # its to_apply is the addition
    turns, loops = times, kind == "while"
    if loops:
      turns *= _trips(text)
    for called in _called(text):
      _walk(called, bodies, times=turns, looped=looped or loops, found=found)


def _operation(text: str) -> tuple[str, str]:
  """(result's shape, operation) of what is right of an instruction's "="."""
  end = _closing(text) if text.startswith("(") else text.index(" ")
  return text[:end], text[end:].strip().partition("(")[0]


def _closing(text: str) -> int:
  """Where the bracket that the text begins with has been closed."""
  depth = 0
  for end, letter in enumerate(text, 1):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return end
  return len(text)


def _collective(
  kind: str, shape: str, text: str, times: int, looped: bool
) -> Collective:
  parts = list(_arrays(shape))
  if f"{kind}-start(" in text and kind in ("all-gather", "collective-permute"):
    # the shape lists what goes in, then what comes out (and, of a
    # permutation, two contexts)
    half = 1 if kind == "collective-permute" else len(parts) // 2
    parts = parts[half : 2 * half]
  size = sum(bits for _, bits in parts)
  if kind == "reduce-scatter":
    size *= _group_size(text)
  names = tuple(sorted({name for name, _ in parts}))
  return Collective(kind, names, int(size), times, looped)


def _arrays(shape: str) -> Iterator[tuple[str, float]]:
  """(type, bytes) of every array in a shape."""
  for name, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape)):
    count = math.prod(int(size) for size in sizes.split(",") if size)
    yield name, count * _width(name)


def _width(name: str) -> float:
  if name in _WIDTHS:
    return _WIDTHS[name]
  bits = re.match(r"[a-z]+(\d+)", name)
  return int(bits[1]) / 8 if bits else 0  # a token has none


def _group_size(text: str) -> int:
  """Chips that share the operation, from either way of writing the groups."""
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return len(listed[1].split(","))
  if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
    return int(counted[1])
  return 1


def _trips(text: str) -> int:
  turns = _TURNS.search(text)
  return int(turns[1]) if turns else 1


def _called(text: str) -> Iterator[str]:
  for _, name in _CALLED.findall(text):
    yield name
  for names in _BRANCHES.findall(text):
    yield from re.findall(r"[\w.\-]+", names)
