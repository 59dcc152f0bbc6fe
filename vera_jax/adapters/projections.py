"""The frozen random pair A, B: made from a seed, never trained, never stored.

Both come from `jax.random.key(seed)`: A from its fold 0, B from its fold 1.
Of the initialisers that draw bits alone, all but the normal and the orthogonal
one, a seed gives the same bits on any device and any number of devices;
`digest` tells when it did not. docs/initialisation.md compares them.

Those of a structured pair are no arrays, and each width of the network has its
own: A_768 and B_768 in place of A and B, whose leading columns and rows a
narrower site takes.
"""

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import PRNGKeyArray

from vera_jax.adapters.interface import Adapter, Matrix, Path, Site, Target
from vera_jax.adapters.sites import role_of
from vera_jax.adapters.structured import Structured, draw, random_signs
from vera_jax.adapters.table import INITIALISERS as INITIALISERS
from vera_jax.adapters.table import STORED as STORED
from vera_jax.adapters.table import STRUCTURED
from vera_jax.errors import UserError

Pair = dict[str, Matrix]
Draw = Callable[[PRNGKeyArray, tuple[int, int]], Array]


def signed_uniform(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """Uniform in (-2^24, 2^24): odd whole numbers, exact in float32.

  Scaling them is one multiplication, rounded alike everywhere; an offset as in
  jax.random.uniform could be fused into it on some devices and not on others.
  """
  bits = (jax.random.bits(key, shape, jnp.uint32) >> 8).astype(jnp.int32)
  return (2 * bits + 1 - 2**24).astype(jnp.float32)


def kaiming_uniform(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """U(-beta, beta), beta = sqrt(6 / fan_in): torch's default, section 4.1."""
  beta = np.sqrt(6 / shape[1])
  return signed_uniform(key, shape) * np.float32(beta * 2.0**-24)


def _kaiming_normal(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """N(0, 2 / fan_in), a row of Table 6."""
  return jax.random.normal(key, shape, jnp.float32) * np.float32(
    np.sqrt(2 / shape[1])
  )


def _uniform_tenth(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """U[0, 0.1), a row of Table 6."""
  bits = jax.random.bits(key, shape, jnp.uint32) >> 8
  return bits.astype(jnp.float32) * np.float32(0.1 * 2.0**-24)


def _orthogonal(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """Orthogonal rows or columns, scaled to Kaiming's variance 2 / fan_in."""
  scale = np.sqrt(2 * max(shape) / shape[1])
  return jax.nn.initializers.orthogonal(scale)(key, shape, jnp.float32)


def _rademacher(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """Of two values, the roots of Kaiming's variance 2 / fan_in."""
  return random_signs(key, shape) * np.float32(np.sqrt(2 / shape[1]))


def _ternary(
  key: PRNGKeyArray, shape: tuple[int, int], *, one_in: float
) -> Array:
  """0 but for one entry in so many, which is either root of a larger variance.

  All together have Kaiming's, 2 / fan_in (Achlioptas 2003; Li et al. 2006).
  """
  bits = jax.random.bits(key, shape, jnp.uint32)
  sign = 1 - 2 * (bits & 1).astype(jnp.int8)
  there = (bits >> 1) < np.uint32(round(2**31 / one_in))
  return sign * there * np.float32(np.sqrt(2 * one_in / shape[1]))


def _sparse_third(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """A third of the entries, drawn, are not 0."""
  return _ternary(key, shape, one_in=3)


def _sparse_root(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """One entry in sqrt(fan_in) is not 0."""
  return _ternary(key, shape, one_in=math.sqrt(shape[1]))


def _ones(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
  """Nothing random: with rank 1, 1LoRA (arXiv 2503.08333)."""
  del key
  return jnp.ones(shape, jnp.float32)


_KEYED: dict[str, Draw] = {
  "kaiming_uniform": kaiming_uniform,
  "kaiming_normal": _kaiming_normal,
  "uniform": _uniform_tenth,
  "orthogonal": _orthogonal,
  "rademacher": _rademacher,
  "sparse_third": _sparse_third,
  "sparse_root": _sparse_root,
  "ones": _ones,
}
PRNG = "threefry2x32"  # gives the same bits on CPU, GPU and TPU
ENTRIES = 2**26  # of random matrices, whatever the layers are


def _peft_pair(
  seed: int, rank: int, inputs: int, outputs: int, rows: int
) -> Pair:
  """PEFT's own matrices for a `projection_prng_key`, bit for bit, no torch.

  PEFT draws A, then B, from one torch CPU generator: MT19937, of whose 32-bit
  outputs a float takes the low 24 bits. The bound is rounded to float32, the
  scaling is done in float64.
  """
  stream = np.random.RandomState(seed)

  def draw(shape: tuple[int, int]) -> Array:
    raw = stream.randint(0, 2**32, size=shape, dtype=np.uint32) & 0xFFFFFF
    bound = np.sqrt(3.0) * (np.sqrt(2.0) / np.sqrt(shape[1]))
    beta = np.float64(np.float32(bound))
    uniform = raw.astype(np.float64) * 2.0**-24
    return jnp.asarray((uniform * (2 * beta) - beta).astype(np.float32))

  return {"A": draw((rows, inputs)), "B": draw((outputs, rank))}


def peft_bases(
  seed: int, rank: int, fewer: int, more: int, matrices: int
) -> Pair:
  """PEFT's bases of RandLoRA for a `projection_prng_key`, bit for bit.

  It draws A, then each B_j, in bfloat16 from torch's CPU generator (MT19937)
  and divides each of the two by its standard deviation, in bfloat16 too. torch
  scales 24 bits before it rounds them, and what rounds up to the range's end
  becomes its beginning: so torch 2.13; older ones drew eight bits.

  Args:
    seed, rank: the key, and r.
    fewer, more: the smaller and the larger width of A's and B's layers.
    matrices: how many B_j there are; they lie side by side in B.
  """
  half = np.dtype(jnp.bfloat16).type
  stream = np.random.RandomState(seed)

  def draw(shape: tuple[int, int], fan: int) -> np.ndarray:
    raw = stream.randint(0, 2**32, size=shape, dtype=np.uint32) & 0xFFFFFF
    bound = np.float64(np.float32(np.sqrt(3.0) * np.sqrt(1 / 3) / np.sqrt(fan)))
    drawn = (raw * 2.0**-24 * (2 * bound) - bound).astype(np.float32)
    drawn = drawn.astype(half)
    return np.where(drawn == half(bound), -drawn, drawn)

  A = draw((rank, fewer), fewer)
  B = np.concatenate([draw((more, rank), rank) for _ in range(matrices)], 1)

  def divided(x: np.ndarray) -> Array:
    deviation = half(np.float32(x.astype(np.float64).std(ddof=1)))
    quotient = x.astype(np.float32) / np.float32(deviation)
    return jnp.asarray(quotient.astype(half), jnp.float32)

  return {"A": divided(A), "B": divided(B)}


def check_choices(
  *,
  seed: int,
  init: str,
  sharing: str = "shared",
  known: Sequence[str] = INITIALISERS,
) -> None:
  """Refuses what no projections can be made of.

  Raises:
    UserError: an `init` that is not `known`, an unknown `sharing`, a
      combination that there is not, or a seed beyond 32 bits, of which the
      generator would cut off the rest.
  """
  if init not in (*known, STORED):
    raise UserError(f"init is {init!r}; choose from {', '.join(known)}.")
  if sharing not in ("shared", "unique"):
    raise UserError(f"sharing is {sharing!r}; choose shared or unique.")
  if sharing == "unique" and init == "peft":
    raise UserError("PEFT's projections are one shared pair, never unique.")
  lowest = 0 if init == "peft" else -(2**31)  # torch's generator has no sign
  if not lowest <= seed < 2**32:
    raise UserError(f"projection_seed must fit 32 bits; got {seed}.")


def make_pair(
  rank: int,
  inputs: int,
  outputs: int,
  *,
  seed: int = 0,
  init: str = "kaiming_uniform",
  folds: Sequence[int] = (),
  rows: int | None = None,
) -> Pair:
  """A (rank, inputs) and B (outputs, rank), in float32 or `Structured`.

  `folds` tell apart the layers that have a pair of their own; `rows` are those
  of A, where it has not `rank` of them.

  Raises:
    UserError: an unknown `init`, or a seed beyond 32 bits.
  """
  rows = rows or rank
  check_choices(seed=seed, init=init)
  if init == STORED:
    raise UserError(
      "Stored projections come from an adapter's file, never from a seed;"
      f" choose init from {', '.join(INITIALISERS)}."
    )
  if init == "peft":
    return _peft_pair(seed, rank, inputs, outputs, rows)
  key = jax.random.key(seed, impl=PRNG)
  for fold in folds:
    key = jax.random.fold_in(key, fold)
  a, b = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
  if init == STRUCTURED:
    a, b = jax.random.fold_in(a, inputs), jax.random.fold_in(b, outputs)
    B = draw(b, rank, outputs, variance=2 / rank)
    return {"A": draw(a, rows, inputs, variance=2 / inputs), "B": B.T}
  entries = _KEYED[init]
  return {"A": entries(a, (rows, inputs)), "B": entries(b, (outputs, rank))}


def _unique_pair(
  path: Path,
  index: int,
  site: Target | Site,
  *,
  rank: int,
  seed: int,
  init: str,
) -> Pair:
  """The pair of one layer: alike in a scanned and in a looped stack."""
  role, numbers = role_of(path)
  name = zlib.crc32(role.encode())
  # a stack may have a number of its own, as linen's default name ScanBlock_0
  folds = (name, *numbers, *([index] if site.stack or not numbers else []))
  size = site.inputs, site.outputs
  return make_pair(rank, *size, seed=seed, init=init, folds=folds)


def check_entries(entries: int, sites: Mapping[Path, Target | Site]) -> None:
  """Refuse random matrices that are larger than what they are put on.

  A rank may be anybody's, in a file of a few kilobytes, and nothing else in it
  need be as large.

  Args:
    entries: how many numbers will be drawn.
    sites: the layers.

  Raises:
    UserError: there are too many.
  """
  kernels = sum(
    site.inputs * site.outputs * math.prod(site.stack)
    for site in sites.values()
  )
  if entries > max(ENTRIES, kernels):
    raise UserError(
      f"The random matrices would have {entries:,} entries, and the layers that"
      f" they are put on have {kernels:,}: is the rank, or size, too high?"
    )


def make_projections(
  sites: Mapping[Path, Target | Site],
  *,
  rank: int,
  seed: int,
  init: str,
  sharing: str = "shared",
  rows: int | None = None,
) -> dict[str, Any]:
  """The `projections` collection for these layers.

  "shared": {"A", "B"} at the root, as wide as the widest site, as PEFT does. Of
  a structured pair {"A_768", "B_768", ...}, for each width that a site has.
  "unique": a pair of its own at each site's path, stacked as the site is.
  `rows` as in `make_pair`, of a shared pair.
  """
  check_choices(seed=seed, init=init, sharing=sharing)
  if sharing == "unique" and init != STRUCTURED:
    numbers = [
      (t.inputs + t.outputs) * math.prod(t.stack) for t in sites.values()
    ]
    check_entries(rank * sum(numbers), sites)
  if sharing == "shared" and init == STRUCTURED:
    by_width: dict[str, Matrix] = {}
    for size in sorted({(t.inputs, t.outputs) for t in sites.values()}):
      pair = make_pair(rank, *size, seed=seed, init=init, rows=rows)
      by_width |= {f"{k}_{w}": pair[k] for k, w in zip("AB", size, strict=True)}
    return by_width
  if sharing == "shared":
    inputs = max(t.inputs for t in sites.values())
    outputs = max(t.outputs for t in sites.values())
    size = inputs, outputs
    check_entries((rows or rank) * inputs + rank * outputs, sites)
    return dict(make_pair(rank, *size, seed=seed, init=init, rows=rows))
  tree: dict[Path, Array] = {}
  for path, site in sites.items():
    pairs = [
      _unique_pair(path, i, site, rank=rank, seed=seed, init=init)
      for i in range(math.prod(site.stack))
    ]

    def stacked(*layers: Array, stack: tuple[int, ...] = site.stack) -> Array:
      return jnp.stack(layers).reshape(*stack, *layers[0].shape)

    for name, matrix in jax.tree.map(stacked, *pairs).items():
      tree[(*path, name)] = matrix
  return unflatten_dict(tree)


def pair_of(site: Site, *, rows: int | None = None) -> tuple[Matrix, Matrix]:
  """(down, up): what a site takes of the projections, A^T and B^T.

  `rows` are the leading ones of A to take; None for all.
  """
  matrices = site.shared
  A = matrices[f"A_{site.inputs}"] if "A" not in matrices else matrices["A"]
  B = matrices[f"B_{site.outputs}"] if "B" not in matrices else matrices["B"]
  if isinstance(A, Structured):
    return (A if rows is None else A.leading(rows)).T, B.T
  return A[:rows, : site.inputs].T, B[: site.outputs].T


def kept_digest(adapter: Adapter, projections: Mapping[str, Any]) -> str | None:
  """The digest that an adapter's file keeps; None where there is no need."""
  known = adapter.from_base or not projections
  return None if known else digest(projections)


def digest(projections: Mapping[str, Any]) -> str:
  """sha256 over the matrices' float32 bytes, the same scanned or looped.

  They go in order of the paths without layer numbers, then of the layers, and A
  before B. Of a structured matrix it is over the signs and what else it is made
  of.
  """
  matrices: dict[tuple[str, tuple[int, ...], str], bytes] = {}
  for path, leaf in flatten_dict(dict(projections)).items():
    role, numbers = role_of(path[:-1])
    about = b""
    if isinstance(leaf, Structured):
      leaf, about = leaf.signs, repr(leaf.definition).encode()
    values = np.asarray(leaf, "<f4")
    for layer in np.ndindex(values.shape[:-2]):
      data = values[layer].tobytes() + about
      matrices[role, (*numbers, *layer), path[-1]] = data
  sha = hashlib.sha256()
  for _, matrix in sorted(matrices.items(), key=lambda item: item[0]):
    sha.update(matrix)
  return sha.hexdigest()
