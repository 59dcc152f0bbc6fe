"""What a compiled program runs, and how often, read from its HLO text."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = "
  r"(?P<shape>.*?) (?P<operation>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_CALLED = re.compile(
  r"(?:body|condition|calls|to_apply|true_computation|false_computation"
  r"|branch_computations)=(\{[^}]*\}|[%\w.\-]+)"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")
_CONSTANT = re.compile(r"^(\d+)\)")
_ITERATIONS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5}  # others say their bits: bf16, s32
Arrays = list[tuple[str, tuple[int, ...]]]  # (element type, sizes) of each


class Run(NamedTuple):
  """An instruction of a program and how often it runs.

  Attributes:
    name, shape, operation, rest: as the text has them; `rest` is all behind the
      operation's parenthesis.
    times: how often a call of the program runs it.
    looped: whether it is inside a loop.
    shapes: of the instructions beside it, by name.
  """

  name: str
  shape: str
  operation: str
  rest: str
  times: int
  looped: bool
  shapes: Mapping[str, str]

  def operands(self) -> list[tuple[int, ...]]:
    """The sizes of the arrays that it reads, where each is one array."""
    names = _OPERANDS.findall(self.rest.partition(")")[0])
    return [arrays(self.shapes[name])[0][1] for name in names]


def runs(text: str, *, whole: tuple[str, ...] = ()) -> Iterator[Run]:
  """All instructions of a module in order, those of a loop's body once.

  Args:
    text: a compiled module's, as `compiled.as_text()` gives it.
    whole: operations whose called computations are not looked into.
  """
  bodies: dict[str, list[re.Match[str]]] = {}
  entry, current = "", []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = bodies.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif match := _INSTRUCTION.match(line):
      current.append(match)
  shapes = {
    name: {match["name"]: match["shape"] for match in body}
    for name, body in bodies.items()
  }

  def iterations(rest: str) -> int:
    """Those of a loop; where the text doesn't say, the condition's bound, which
    a counter from 0 is compared with, by what the body adds to the counter."""
    if known := _ITERATIONS.search(rest):
      return int(known[1])
    condition, body = _CONDITION.search(rest), _BODY.search(rest)
    if condition is None or body is None:
      return 1
    of_condition, of_body = (
      {match["name"]: match for match in bodies.get(found[1], [])}
      for found in (condition, body)
    )
    for match in of_condition.values():
      if match["operation"] == "compare" and "direction=LT" in match["rest"]:
        counter, bound = _OPERANDS.findall(match["rest"])[:2]
        last = _constant(of_condition, bound)
        step = _step(of_body, _INDEX.search(of_condition[counter]["rest"]))
        return -(-last // step) if last else 1
    return 1

  def walk(name: str, times: int, looped: bool) -> Iterator[Run]:
    for match in bodies.get(name, []):
      operation, rest = match["operation"], match["rest"]
      yield Run(
        *(match["name"], match["shape"], operation, rest),
        *(times, looped, shapes[name]),
      )
      if operation.removesuffix("-start") in whole:
        continue
      loops = operation == "while"
      inner = times * iterations(rest) if loops else times
      for called in _CALLED.findall(rest):
        for computation in re.findall(r"[\w.\-]+", called):
          yield from walk(computation, inner, looped or loops)

  return walk(entry, 1, False)


def _constant(body: Mapping[str, re.Match[str]], name: str) -> int | None:
  """The number that an instruction is, if it is one."""
  match = body.get(name)
  number = match and _CONSTANT.match(match["rest"])
  return int(number[1]) if number else None


def _step(
  body: Mapping[str, re.Match[str]], index: re.Match[str] | None
) -> int:
  """What a loop's body adds to this element of its tuple: a loop that XLA has
  unrolled adds more than 1, which is what is taken where it can't be seen."""
  results = [x for x in body.values() if x["operation"] == "tuple"]
  if index is None or not results:
    return 1
  counter = _OPERANDS.findall(results[-1]["rest"])[int(index[1])]
  added = body[counter]
  if added["operation"] != "add":
    return 1
  terms = (_constant(body, x) for x in _OPERANDS.findall(added["rest"])[:2])
  return next(filter(None, terms), 1)


def arrays(shape: str) -> Arrays:
  """The arrays of a shape, or of a tuple of shapes."""
  return [
    (name, tuple(int(size) for size in sizes.split(",") if size))
    for name, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape))
  ]


def width(element: str) -> float:
  """Bytes of a number of this type; a token has none."""
  bits = re.match(r"[a-z]+(\d+)", element)
  return _WIDTHS.get(element, int(bits[1]) / 8 if bits else 0)


def product_flops(text: str) -> float:
  """FLOPs of a program's products and convolutions on one device.

  XLA's own count takes a loop's body once, however often it runs.
  """
  return sum(_flops(run) * run.times for run in runs(text))


def _flops(run: Run) -> float:
  if run.operation not in ("dot", "convolution"):
    return 0
  (_, outputs), *_ = arrays(run.shape)
  left, right = run.operands()[:2]
  if run.operation == "dot":
    match = _CONTRACTED.search(run.rest)
    contracted = match[1].split(",") if match and match[1] else []
    return (
      2.0 * math.prod(outputs) * math.prod(left[int(i)] for i in contracted)
    )
  labels = _LABELS.search(run.rest)
  assert labels is not None  # every convolution has them
  of_left, of_kernel, of_output = labels.groups()
  sums = right[of_kernel.index("i")]
  places = math.prod(outputs[of_output.index(x)] for x in "bf")
  window = _WINDOW.search(run.rest)
  options = dict(x.split("=") for x in window[1].split()) if window else {}
  for axis in filter(str.isdigit, of_output):
    sums *= _pairs(
      int(axis),
      options,
      left[of_left.index(axis)],
      outputs[of_output.index(axis)],
    )
  return 2.0 * places * sums


def _pairs(
  axis: int, options: Mapping[str, str], inputs: int, outputs: int
) -> int:
  """How many pairs of an output and a window's place along an axis have an
  input, and so a product: TPUs have a batched product's batches as an axis
  along which a window meets one of its inputs at a time."""

  def option(name: str, default: str) -> str:
    return options[name].split("x")[axis] if name in options else default

  size, stride = int(option("size", "1")), int(option("stride", "1"))
  inner, outer = (int(option(f"{x}_dilate", "1")) for x in ("lhs", "rhs"))
  before = int(option("pad", "0_0").partition("_")[0])
  at = np.arange(outputs)[:, None] * stride + np.arange(size) * outer - before
  inside = (at >= 0) & (at < (inputs - 1) * inner + 1) & (at % inner == 0)
  return int(inside.sum())
