"""What holds for every adapter method, and for the probes of the interface.

The adapted weights are the definition: the forward, its gradients and the
merged network must agree with them, in whatever way the layers are laid out.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.adapters.conftest import Net, stacked
from tests.adapters.probes import PROBES, Probe, with_codes
from vera_jax.adapters import methods
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.base_leaves import bitfit, full, head, norms
from vera_jax.adapters.chain import chain
from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.intercept import KEYS, PENALTIES
from vera_jax.adapters.interface import PLANS
from vera_jax.adapters.labels import ADAPTER, label_tree
from vera_jax.adapters.lora import lora, lora_fa
from vera_jax.adapters.lora_xs import lora_xs
from vera_jax.adapters.magnitude import dora, dvora
from vera_jax.adapters.merge import merge
from vera_jax.adapters.pvera import pvera
from vera_jax.adapters.randlora import randlora
from vera_jax.adapters.sites import (
  prepared_leaves,
)
from vera_jax.adapters.tied_lora import tied_lora
from vera_jax.adapters.unilora import unilora
from vera_jax.adapters.vera import onelora, vera
from vera_jax.errors import UserError

METHODS = {
  "vera": Probe(vera(3)),
  "vera, a pair per layer": Probe(vera(3, sharing="unique")),
  "vera, structured": Probe(vera(3, init="structured")),
  "vera, structured, a pair per layer": Probe(
    vera(3, init="structured", sharing="unique")
  ),
  "onelora": Probe(onelora()),
  "vera, d alone": Probe(vera(3, train="d")),
  "pvera": Probe(pvera(3)),
  "lora": Probe(lora(2, alpha=2.0)),
  "lora_fa": Probe(lora_fa(2, scaling="root")),
  "randlora": Probe(randlora(3, alpha=3.0)),
  "unilora": Probe(unilora(2, size=40)),
  "lora_xs": Probe(lora_xs(2)),
  "tied_lora": Probe(tied_lora(3)),
  "ia3": Probe(ia3(feedforward=("out",))),
  "dora": Probe(dora(2)),
  "vera and bitfit": Probe(chain(vera(3), bitfit())),
  "dvora and ia3, each on its own": Probe(
    chain(
      dvora(3)._replace(on=("heads",)),
      ia3(feedforward=("out",))._replace(on=("out",)),
    )
  ),
  "bitfit": Probe(bitfit(), ()),
  "norms": Probe(norms(), ()),
  "full": Probe(full(), ()),
  "head": Probe(head(), ()),
  **PROBES,
}
STARTS_ELSEWHERE = ("unilora",)  # only with theta at 0 it adds nothing
SLOW = pytest.mark.slow
VARIANTS = {  # of others that are quick
  *("vera, a pair per layer", "vera, structured, a pair per layer", "onelora"),
  *("vera, d alone", "lora_fa", "vera and bitfit"),
  "dvora and ia3, each on its own",
}
# One of a kind: what a batch of adapters and their files could treat otherwise.
SAME = {"vera, a pair per layer", "onelora", "lora_fa", "vera and bitfit"}
OTHERWISE = [name for name in METHODS if name not in SAME]
# How layers are laid out and what a method computes are apart, but for methods
# that treat layers in a way of their own.
LOOPED = (
  *("vera", "vera, a pair per layer", "randlora", "unilora", "lora_xs", "ia3"),
  *("dora", "dvora and ia3, each on its own", "full", "random numbers"),
  *("matrices from W0", "columns", "int8"),
)
REMAT = (
  *("vera", "pvera", "unilora", "dora", "dvora and ia3, each on its own"),
  *("random numbers", "int8"),
)
each_layout = pytest.mark.parametrize(
  "layout",
  [
    pytest.param("looped", marks=SLOW),
    "scanned",
    pytest.param("remat", marks=SLOW),
  ],
)


class Ready:
  """A method on the network: module, parameters, projections, targets."""

  def __init__(self, name, layout, base, x, *, perturbed=False, **options):
    probe = METHODS[name]
    self.adapter = probe.adapter
    self.model = Net(layout)
    params = base if layout == "looped" else stacked(base)
    self.base = with_codes(params) if probe.quantised else params
    self.module = adapt(
      self.model,
      self.adapter,
      targets=probe.targets,
      fused=probe.fused,
      **options,
    )
    self.targets = self.module.find_targets(x) if probe.targets else {}
    key = jax.random.key(7)
    variables = self.module.init_on({"params": self.base}, key, x)
    self.params = variables["params"]
    self.projections = variables.get("projections", {})
    if perturbed:
      self.params = perturb(self.params, self.adapter)

  def __call__(self, params, x, key=None):
    """(outputs, penalties)."""
    variables = {"params": params}
    if self.projections:
      variables["projections"] = self.projections
    y, sown = self.module.apply(
      variables,
      x,
      rngs=None if key is None else {KEYS: key},
      mutable=[PENALTIES],
    )
    return y, sum(map(jnp.sum, jax.tree.leaves(sown)))

  def merged(self, params):
    return merge(
      params, self.projections, adapter=self.adapter, targets=self.targets
    )


def test_no_method_is_left_out():
  assert methods.METHODS.keys() <= set(re.findall(r"\w+", " ".join(METHODS)))


def trained_paths(params, adapter):
  labels = flatten_dict(label_tree(params, adapter))
  return [path for path, label in labels.items() if label == ADAPTER]


def perturb(params, adapter):
  """The trained leaves moved by random amounts; the same looped or scanned."""
  flat = flatten_dict(params)
  for path in trained_paths(params, adapter):
    rng = np.random.default_rng(len(path[-1]))
    shape = flat[path].shape
    move = rng.normal(size=shape[1:] if "layer" in path else shape)
    move = np.broadcast_to(move, shape).astype(np.float32)
    flat[path] = flat[path] + 0.3 * move
  return unflatten_dict(flat)


@partial(jax.jit, static_argnums=0)
def plain(model, params, x):
  """The network without adapter; quantised kernels are dequantised by it."""
  module = adapt(model, head(), targets=())
  return module.apply({"params": params}, x)


@pytest.mark.parametrize(
  "name, layout",
  [
    *(
      pytest.param(name, "scanned", marks=[SLOW] if name in VARIANTS else [])
      for name in METHODS
    ),
    *(pytest.param(name, "looped", marks=SLOW) for name in LOOPED),
    *(pytest.param(name, "remat", marks=SLOW) for name in REMAT),
  ],
)
def test_adapted_is_the_base_first_and_later_the_merged_network(
  name, layout, base, x
):
  """In value, and in the gradient of every trained leaf, none of them zero."""
  ready = Ready(name, layout, base, x)
  sizes = [
    leaf.size
    for path, leaf in flatten_dict(ready.params).items()
    if ready.adapter.owns(path[-1])
  ]
  assert adapter_size(ready.adapter, ready.targets) == sum(sizes)
  paths = trained_paths(ready.params, ready.adapter)

  def slopes(outputs):
    @jax.jit
    def run(params):
      flat = flatten_dict(params)

      def loss(trained):
        y = outputs(unflatten_dict({**flat, **trained}))
        return jnp.sum(jnp.sin(y)), y

      return jax.grad(loss, has_aux=True)({p: flat[p] for p in paths})

    return run

  def merged(params):
    whole = ready.merged(params)
    assert not any(ready.adapter.owns(path[-1]) for path in flatten_dict(whole))
    return plain(ready.model, whole, x)

  adapted = slopes(lambda params: ready(params, x)[0])
  start = ready.params
  if name in STARTS_ELSEWHERE:
    start = jax.tree.map_with_path(
      lambda path, leaf: leaf * 0 if "theta" in str(path) else leaf, start
    )
  unadapted = plain(ready.model, ready.base, x)
  np.testing.assert_allclose(adapted(start)[1], unadapted, rtol=0, atol=1e-6)

  moved = perturb(ready.params, ready.adapter)
  found, y = adapted(moved)
  expected, want = slopes(merged)(moved)
  np.testing.assert_allclose(want, y, atol=2e-5)
  if name != "head":
    assert np.abs(y - unadapted).max() > 1e-2
  for path, gradient in found.items():
    if path[-1] == "noisy_log_sigma":  # has a part in training alone
      continue
    scale = float(np.abs(expected[path]).max())
    assert scale > 0, path
    np.testing.assert_allclose(
      gradient, expected[path], rtol=0, atol=2e-5 * max(scale, 1)
    )
  # Singular vectors, which one of the probes takes, have no sign.
  if layout != "looped" and name != "matrices from W0":
    looped = Ready(name, "looped", base, x).params
    jax.tree.map(
      partial(np.testing.assert_allclose, atol=1e-6),
      stacked(looped),
      ready.params,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_batch_of_adapters_equals_each_alone(name, base, x):
  """vmap over the trained leaves, as an ensemble and a bank do it.

  What a bank would run has no array of the size rows x in x out.
  """
  ready = Ready(name, "scanned", base, x, plan="factored")
  paths = trained_paths(ready.params, ready.adapter)
  if not paths:
    pytest.skip("nothing but the head is trained")
  flat = flatten_dict(ready.params)

  def with_move(amount):
    return {p: flat[p] * (1 + amount) + 0.1 * amount for p in paths}

  amounts = jnp.asarray([0.0, 0.5, -0.4, 0.2, 0.1])
  own = jax.vmap(with_move)(amounts)

  def run(own):
    return ready(unflatten_dict({**flat, **own}), x)[0]

  together = jax.jit(jax.vmap(run))(own)
  for n, amount in enumerate(amounts[:2]):
    np.testing.assert_allclose(
      together[n], jax.jit(run)(with_move(amount)), atol=1e-5
    )
  if ready.adapter.prepare is None:
    return

  def prepare(own):
    params = unflatten_dict({**flat, **own})
    leaves = prepared_leaves(
      ready.adapter, ready.targets, params, ready.projections
    )
    bare = {p: v for p, v in flat.items() if not ready.adapter.owns(p[-1])}
    biases = {p: v for p, v in own.items() if p in bare}
    return unflatten_dict(bare), flatten_dict(leaves) | biases

  bare, _ = prepare(with_move(0.0))
  banked = jax.vmap(lambda own: prepare(own)[1])(own)

  def row(own, x):
    params = unflatten_dict(flatten_dict(bare) | own)
    return ready(params, x[None])[0][0]

  rows = jnp.stack([x[0]] * len(amounts))
  answers = jax.jit(jax.vmap(row))(banked, rows)
  np.testing.assert_allclose(answers, together[:, 0], atol=2e-5)
  jaxpr = str(jax.make_jaxpr(jax.vmap(row))(banked, rows))
  for kernel in ("5,8,8]", "5,8,24]", "5,8,2,4]", "5,2,4,8]"):
    assert f"f32[{kernel}" not in jaxpr


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["pvera", "matrices from W0", "int8"])
def test_every_plan_is_the_same_function(name, plan, base, x):
  """VeRA's and LoRA's are in test_products.py."""
  ready = Ready(name, "scanned", base, x, perturbed=True, plan=plan)
  y, _ = jax.jit(ready)(ready.params, x)
  merged = ready.merged(ready.params)
  np.testing.assert_allclose(plain(ready.model, merged, x), y, atol=2e-5)


@each_layout
def test_random_numbers_and_penalty_in_training_only(layout, base, x):
  ready = Ready("random numbers", layout, base, x, perturbed=True)
  run = jax.jit(ready)
  still, penalty = run(ready.params, x)
  one, other = (run(ready.params, x, jax.random.key(k))[0] for k in (1, 2))
  assert np.abs(one - other).max() > 1e-3 < np.abs(one - still).max()
  flat = flatten_dict(ready.params)
  sigma = [v for p, v in flat.items() if p[-1] == "noisy_log_sigma"]
  shape = (-1, sigma[0].shape[-1])
  expected = sum(np.mean(np.exp(2 * s.reshape(shape)), 1).sum() for s in sigma)
  np.testing.assert_allclose(penalty, expected, rtol=1e-5)


def test_layers_draw_numbers_of_their_own(base, x):
  ready = Ready("random numbers", "scanned", base, x, perturbed=True)
  first = flatten_dict(ready.params)[("layer", "out", "noisy_d")]
  assert len({float(row[0]) for row in first}) == len(first)


def test_a_part_and_its_whole_layer_are_refused(x):
  fused = METHODS["columns"].fused
  module = adapt(Net(), vera(3), targets=("fused", "query"), fused=fused)
  with pytest.raises(UserError, match="name one of them"):
    module.find_targets(x)


def test_a_module_without_the_adapters_leaves_says_so(base, x):
  module = adapt(Net(), vera(3), targets=("out",))
  projections = vera(3).shared(module.find_targets(x))
  with pytest.raises(UserError, match="no leaves of vera at layer_0/out"):
    module.apply({"params": base, "projections": projections}, x)


def test_layers_with_their_own_dot_general_keep_it(x):
  """Nothing is folded into another order behind such a layer's back."""
  seen = []

  def noted(a, b, *args, **kwargs):
    seen.append(a.shape)
    return jax.lax.dot_general(a, b, *args, **kwargs)

  model = nn.Dense(4, dot_general=noted)
  module = adapt(nn.Sequential([model]), vera(3), targets=(".*",))
  variables = module.init(jax.random.key(0), x)
  seen.clear()
  module.apply(variables, x)
  assert {*seen} == {x.shape}
