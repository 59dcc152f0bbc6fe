"""A trained adapter from inside."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vera_jax import load_adapter, restore_adapter
from vera_jax.adapters.merge import merge
from vera_jax.report import plots, spectra
from vera_jax.report.spectra import deltas


@pytest.mark.parametrize(
  "method, scan, settings",
  [
    ("vera", False, {"rank": 3}),
    ("vera", True, {"rank": 3, "sharing": "unique"}),
    ("lora", True, {"rank": 3}),
  ],
)
def test_the_delta_is_what_merging_adds(random_adapter, method, scan, settings):
  saved = load_adapter(random_adapter(method, **settings))
  classifier = restore_adapter(saved, scan=scan)
  found = deltas(classifier)
  assert list(found) == [
    (layer, kind) for layer in (0, 1) for kind in ("query", "value")
  ]
  merged = merge(
    classifier.params,
    classifier.projections,
    adapter=classifier.adapter,
    targets=classifier.targets,
  )
  before, after = map(flatten_dict, (classifier.params, merged))
  added = {
    path: np.asarray(after[(*path, "kernel")] - before[(*path, "kernel")])
    for path in classifier.targets
  }
  total = sum((delta**2).sum() for delta in found.values())
  expected = sum((delta**2).sum() for delta in added.values())
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  last = added["encoder", "layer_1", "attention", "self", "query"]
  np.testing.assert_allclose(found[1, "query"], last, atol=1e-6)


def test_no_more_directions_than_the_rank(random_adapter):
  saved = load_adapter(random_adapter(rank=3))
  values = spectra(restore_adapter(saved))
  assert len(values) == 4 * 16
  assert (values[values["place"] > 3]["value"] < 1e-6).all()
  assert (values["counted"] <= 3).all()
  assert values["stable_rank"].between(1, 3).all()
  assert len(plots.spectrum_figure(values).axes) == 2
  assert len(plots.vector_figure(saved.tensors).axes) == 4
