"""Merging changes the adapted kernels alone, and the given tree not at all.

That the merged network is the adapted one, test_every_method.py shows.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.adapters.conftest import Net
from tests.slow import rest_is_slow
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.chain import chain
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.lora import lora
from vera_jax.adapters.merge import merge
from vera_jax.adapters.unilora import unilora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError


def start(model, x):
  """First variables, the adapter's leaves away from where they start."""
  variables = jax.jit(model.init)(jax.random.key(2), x)
  rng = np.random.default_rng(1)
  flat = flatten_dict(variables["params"])
  for path in sorted(flat):
    if model.adapter.owns(path[-1]):
      noise = 0.5 * rng.standard_normal(flat[path].shape)
      flat[path] = jnp.asarray(noise, jnp.float32)
  return {**variables, "params": unflatten_dict(flat)}


@pytest.mark.smoke
@pytest.mark.parametrize("method", [vera(5), lora(2)], ids=["vera", "lora"])
def test_axes_named_out_of_order(method):
  """The kernel's axes are those of x, whatever order the layer names."""
  layer = nn.DenseGeneral(5, axis=(-1, -2))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 7)), "float32")
  model = adapt(nn.Sequential([layer]), method, targets=["layers_0"])
  variables = start(model, x)
  merged = merge(
    variables["params"],
    variables.get("projections", {}),
    adapter=method,
    targets=model.find_targets(x),
  )
  bare = model.model.apply({"params": merged}, x)
  np.testing.assert_allclose(bare, model.apply(variables, x), atol=1e-5)


@pytest.mark.parametrize(
  "method, dtype",
  rest_is_slow([(vera(5), "bfloat16"), (lora(2), "float32")]),
  ids=["vera", "lora"],
)
def test_only_adapted_kernels_change_and_keep_their_type(method, dtype, x):
  """The tree that is merged is kept bit for bit."""
  model = adapt(Net("scanned"), method, targets=["heads"])
  variables = start(model, x)
  params = jax.tree.map(lambda a: a.astype(dtype), variables["params"])
  bits = partial(jax.tree.map, lambda a: np.asarray(a).tobytes())
  before = bits(params)
  merged = merge(
    params,
    variables.get("projections", {}),
    adapter=method,
    targets=model.find_targets(x),
  )
  assert bits(params) == before
  old, new = flatten_dict(before), flatten_dict(bits(merged))
  changed = {path for path in new if new[path] != old[path]}
  assert changed == {("layer", "heads", "kernel")}
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(merged))


def test_targets_that_are_not_the_adapters_are_refused(x):
  """Its leaves would be dropped without a word."""
  model = adapt(Net("looped"), vera(2), targets=["heads"])
  variables = start(model, x)
  targets = model.find_targets(x)
  fold = partial(merge, variables["params"], variables["projections"])
  with pytest.raises(UserError, match="have leaves of vera at .*heads, .*none"):
    fold(adapter=vera(2), targets={})
  with pytest.raises(UserError, match="have no leaves of lora at .*heads"):
    fold(adapter=lora(2), targets=targets)


def test_a_chain_on_a_site_without_leaves_of_its_own(x):
  """Uni-LoRA's one vector lies at the root."""
  on = {"fused": unilora(2, size=8), "heads": ia3()}
  method = chain(*(m._replace(on=(name,)) for name, m in on.items()))
  model = adapt(Net("looped"), method, targets=list(on))
  variables = start(model, x)
  merged = merge(
    variables["params"],
    variables["projections"],
    adapter=method,
    targets=model.find_targets(x),
  )
  bare = model.model.apply({"params": merged}, x)
  np.testing.assert_allclose(bare, model.apply(variables, x), atol=1e-5)
