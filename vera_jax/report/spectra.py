"""The merged delta of a trained adapter, layer by layer, and its spectrum."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from vera_jax.adapters.files import named_slices
from vera_jax.adapters.interface import Path
from vera_jax.adapters.norms import SHORT
from vera_jax.errors import UserError
from vera_jax.models.pretrained import Classifier

Matrix = Float[np.ndarray, "inputs outputs"]
COUNTED = 0.01  # of the largest singular value: what counts for the rank


def deltas(classifier: Classifier) -> dict[tuple[int, str], Any]:
  """What merging adds to each adapted kernel, by (layer, kind of layer).

  Raises:
    UserError: the classifier has no adapter: a merged folder, or a method that
      trains the base itself.
  """
  adapter = classifier.adapter
  if adapter is None:
    raise UserError(
      "This classifier has no adapter whose delta could be shown."
    )
  params = flatten_dict(classifier.params)
  matrices = flatten_dict(classifier.projections)
  shared = {k[0]: v for k, v in matrices.items() if len(k) == 1}
  found: dict[tuple[int, str], Any] = {}
  for path, target in classifier.targets.items():
    size = target.inputs, target.outputs
    own = {k[-1]: v for k, v in matrices.items() if k[:-1] == path}
    leaves = {name: params[(*path, name)] for name in adapter.init(*size)}
    delta = partial(adapter.kernel, inputs=size[0], outputs=size[1])
    for _ in target.stack:
      delta = jax.vmap(delta, in_axes=(0, 0 if own else None))
    found |= _by_layer(path, np.asarray(delta(leaves, own or shared)))
  return dict(sorted(found.items()))


def _by_layer(path: Path, delta: np.ndarray) -> dict[tuple[int, str], Matrix]:
  """One matrix a layer; a scanned stack has them behind a first axis."""
  found = {}
  for name, matrix in named_slices((*path, "kernel"), delta):
    *_, number, kind, _ = _split(name)
    assert matrix is not None
    found[int(number), SHORT.get(kind, kind)] = matrix
  return found


def _split(name: str) -> tuple[str, str, str, str]:
  """encoder.layer.3.attention.self.query.kernel, in its parts."""
  before, _, rest = name.partition("encoder.layer.")
  number, _, rest = rest.partition(".")
  kind, _, leaf = rest.rpartition(".")
  return before, number, kind, leaf


def spectra(classifier: Classifier) -> pd.DataFrame:
  """The singular values of every layer's merged delta.

  A row a value: layer, kind, place (from 1, the largest), value, and of the
  whole layer: norm (Frobenius), stable_rank (squared norm over the largest
  value's square) and counted (values above a hundredth of the largest).
  """
  rows: list[dict[str, Any]] = []
  for (layer, kind), delta in deltas(classifier).items():
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    norm = float(np.linalg.norm(values))
    whole = {
      "norm": norm,
      "stable_rank": (norm / values[0]) ** 2 if values[0] else 0.0,
      "counted": int((values > COUNTED * values[0]).sum()),
    }
    rows += [
      {"layer": layer, "kind": kind, "place": i, "value": value, **whole}
      for i, value in enumerate(values.tolist(), 1)
    ]
  return pd.DataFrame(rows)
