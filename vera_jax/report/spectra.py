"""The merged delta of a trained adapter, layer by layer, and its spectrum."""

import re
from typing import Any

import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from vera_jax.adapters.files import named_slices
from vera_jax.adapters.merge import merge
from vera_jax.adapters.sites import layer_path
from vera_jax.adapters.vector_norms import SHORT
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import Classifier

KERNEL = re.compile(r".*encoder\.layer\.(?P<layer>\d+)\.(?P<kind>.+)\.kernel")
Matrix = Float[np.ndarray, "inputs outputs"]
COUNTED = 0.01  # of the largest singular value: what counts for the rank


def deltas(classifier: Classifier) -> dict[tuple[int, str], Matrix]:
  """What merging adds to each adapted kernel, by (layer, kind of layer).

  Raises:
    UserError: the classifier has no adapter: a merged folder, or a method that
      trains the base itself.
  """
  adapter = classifier.adapter
  if not classifier.targets:
    raise UserError(
      "This classifier has no adapter whose delta could be shown."
    )
  merged = flatten_dict(
    merge(
      classifier.params,
      classifier.projections,
      adapter=adapter,
      targets=classifier.targets,
    )
  )
  params = flatten_dict(classifier.params)
  matrices: dict[tuple[int, str], Matrix] = {}
  for path, target in classifier.targets.items():
    kernel = (*layer_path(path, target), target.view.kernel)
    added = np.asarray(merged[kernel]) - np.asarray(params[kernel])
    added = added[..., slice(*target.columns or (None,))]
    stack = added.reshape(*target.stack, target.inputs, target.outputs)
    for name, matrix in named_slices((*path, "kernel"), stack):
      match = KERNEL.fullmatch(name)
      assert match and matrix is not None
      kind = SHORT.get(match["kind"], match["kind"])
      matrices[int(match["layer"]), kind] = matrix
  return dict(sorted(matrices.items()))


def spectra(classifier: Classifier) -> pd.DataFrame:
  """The singular values of every layer's merged delta.

  One row per value: layer, kind, place (from 1, the largest), value, and of the
  whole layer: norm (Frobenius), stable_rank (squared norm over the largest
  value's square) and counted (values above a hundredth of the largest).
  """
  rows: list[dict[str, Any]] = []
  for (layer, kind), delta in deltas(classifier).items():
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    norm = float(np.linalg.norm(values))
    of_layer = {
      "norm": norm,
      "stable_rank": (norm / values[0]) ** 2 if values[0] else 0.0,
      "counted": int((values > COUNTED * values[0]).sum()),
    }
    rows += [
      {"layer": layer, "kind": kind, "place": i, "value": value, **of_layer}
      for i, value in enumerate(values.tolist(), 1)
    ]
  return pd.DataFrame(rows)
