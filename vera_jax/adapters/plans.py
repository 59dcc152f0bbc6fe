"""Which plan multiplies a low-rank delta, and what each of them costs.

`products.py` has the plans themselves. With t rows of x and a delta down @ up
of shapes (i, r) and (r, o), one training step costs, beside x @ W0 and its
input gradient, as many multiply-adds as `costs` says. Factored is for few rows
or a low rank, folded for many rows, folded_forward for what lies between.
Several layers on one input need x @ down once: XLA merges equal products. A
matrix may be structured: then its products cost what they cost.
"""

import math
from typing import NamedTuple

from jax.sharding import Sharding

from vera_jax.adapters.interface import (
  MATRIX,
  PLANS,
  LowRank,
  Matrix,
  Path,
  View,
)
from vera_jax.adapters.structured import Structured
from vera_jax.errors import UserError

AUTO, FACTORED = "auto", "factored"


class Split(NamedTuple):
  """How a mesh divides a layer's products, beside the rows that they have.

  Attributes:
    fsdp: parts in which the kernel is stored, each of which is adapted where it
      is, before they are gathered.
    inputs, outputs: parts of the kernel that are multiplied with where they
      are: the mesh's `tensor` on one side.
    up: how `up`, scaled, lies where a kernel is folded: None on one device.
    down: how `down` does.
    thin: how the rank of x @ down is divided, [rows, rank].
    tensor: into how many parts.
  """

  fsdp: int = 1
  inputs: int = 1
  outputs: int = 1
  up: Sharding | None = None
  down: Sharding | None = None
  thin: Sharding | None = None
  tensor: int = 1


WHOLE = Split()


def check_plan(name: str) -> str:
  """Returns the name itself.

  Raises:
    UserError: it is neither a plan's nor "auto".
  """
  if name not in (AUTO, *PLANS):
    raise UserError(
      f"contraction is {name!r}; choose {AUTO}, {', '.join(PLANS)}."
    )
  return name


def costs(
  tokens: int,
  factors: LowRank,
  *,
  forwards: int = 1,
  view: View = MATRIX,
  split: Split = WHOLE,
) -> dict[str, float]:
  """Multiply-adds that a delta costs a device per training step, by plan.

  Args:
    tokens: rows of x.
    factors: the delta's; their shapes alone are read. In factored form the
      gradients of vectors that scale fixed matrices need no product.
    forwards: how often a step runs the forward pass: twice with remat.
    view: of the layer's kernel. Where x are row numbers, rows of `down` are
      taken; where the layer forms matrices, x @ down is a dense product.
    split: of the kernel over the devices.
  """
  down, up = factors.down, factors.up
  (inputs, rank), outputs = down.shape, up.shape[-1]
  parts = split.inputs * split.outputs
  thin = tokens * inputs * rank if view.forms else _cost(down, tokens)
  if view.looked_up:
    thin = 0
  to_thin = thin / split.inputs
  to_wide = tokens * rank * outputs / split.outputs
  to_kernel = tokens * inputs * outputs / parts
  if view.looked_up:
    to_kernel = 0
  # the kernel's gradient is each device's own, from its rows
  back = _cost(down, outputs) / parts
  build = back / split.fsdp
  formed = _cost(up, rank) if isinstance(up, Structured) else 0
  formed_down = 0
  if view.forms and isinstance(down, Structured):
    formed_down = _cost(down, rank)
  to_down, to_up = int(factors.trains_down), int(factors.trains_up)
  scales = factors.inner is not None or factors.outer is not None
  plans = {
    "factored": (forwards + 1) * (to_thin + _cost(up, tokens) / split.outputs)
    + to_down * to_thin
    + to_up * to_wide
    + forwards * formed_down,
    # to trained vectors, too, the gradient goes by way of that of `up`
    "folded": forwards * build
    + (to_down + int(to_up or scales)) * back
    + forwards * formed
    + to_kernel,
  }
  if not factors.trains_down:
    # the rank is divided where inputs or outputs are not
    backward = formed_down + (thin + tokens * rank * outputs) / parts
    plans["folded_forward"] = forwards * (build + formed) + backward
  return plans


def _cost(matrix: Matrix, vectors: int) -> int:
  """Multiply-adds of its product with as many vectors."""
  if isinstance(matrix, Structured):
    return matrix.cost(vectors)
  return vectors * math.prod(matrix.shape)


def choose(
  tokens: int,
  factors: LowRank,
  *,
  plan: str = AUTO,
  forwards: int = 1,
  view: View = MATRIX,
  split: Split = WHOLE,
  path: Path = (),
) -> str:
  """The plan that is asked for, or for "auto" the cheapest for these shapes.

  Where the layer's kind (`view`) does not allow the plan, the cheapest of those
  that it allows; but what is not to be folded, as in a bank, never is. The path
  is for messages.

  Raises:
    UserError: the method or the layer has no such plan.
  """
  if plan == FACTORED and plan not in view.plans:
    raise no_factored(path, view)
  if plan == "folded_forward" and factors.trains_down:
    raise UserError(
      f"There is no folded_forward plan for {'/'.join(path)}: its delta's first"
      " matrix depends on trained numbers. Choose auto, factored or folded."
    )
  if plan in view.plans:
    return plan
  priced = costs(tokens, factors, forwards=forwards, view=view, split=split)
  return min((x for x in priced if x in view.plans), key=lambda x: priced[x])


def no_factored(path: Path, view: View) -> UserError:
  """Of a layer whose adapted kernel would be made under the factored plan."""
  return UserError(
    f"The adapted kernel of {'/'.join(path)} ({view.kind}) can be made only"
    " as a whole here: it has no factored plan, which a bank of adapters takes"
    " too. Choose auto or folded; answer by a Predictor for each adapter."
  )
