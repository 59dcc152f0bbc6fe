"""Layer kinds beyond dense ones: what their kernels are seen as, and adapted.

Float32 products agree within 1e-5; gradients with those of the same network in
float64 within 1e-4 of the largest.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.adapters.adapted_networks import IDS, RANK, RNG, Ready, by_definition
from tests.adapters.architectures import (
  KEY_VALUE,
  MIXED,
  WAYS,
  Busy,
  CastEinsum,
  Decoder,
  Depthwise,
  Derived,
  Einsum,
  Images,
  Mixed,
  Shared,
)
from tests.adapters.test_every_method import METHODS
from tests.slow import rest_is_slow
from vera_jax.adapters.apply import adapt, find_targets
from vera_jax.adapters.chain import chain
from vera_jax.adapters.counting import adapter_size, leaf_shapes, plans_at
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.intercept import KEYS
from vera_jax.adapters.interface import PLANS, Site, Target
from vera_jax.adapters.lora import lora, lora_fa
from vera_jax.adapters.plans import choose, costs
from vera_jax.adapters.pvera import pvera
from vera_jax.adapters.sites import count_layers
from vera_jax.adapters.unilora import unilora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

IMAGES = jnp.asarray(RNG.normal(size=(2, 5, 6, 4)), jnp.float32)
TARGET = Target(9 * 64, 64)
SITE = Site(
  ("conv",),
  TARGET.inputs,
  TARGET.outputs,
  lambda: jnp.zeros((TARGET.inputs, TARGET.outputs)),
  shared={"A": jnp.ones((32, TARGET.inputs)), "B": jnp.ones((64, 32))},
)


def by_taps(A, B, d, b, shape):
  """Each position of the window with a d of its own."""
  *window, inputs, outputs = shape
  d = d.reshape(*window, -1)
  return jnp.einsum("ri,...r,or,o->...io", A[:, :inputs], d, B[:outputs], b)


@pytest.mark.parametrize(
  "kind, scan, feed",
  rest_is_slow([(Einsum, True, ["Einsum_.*"]), (CastEinsum, False, [])]),
)
def test_a_decoder_by_others_is_adapted_unchanged(kind, scan, feed):
  """Its equations tell inputs from outputs; q and v are counted right. Modules
  that share a scope are told apart."""
  ready = Ready(
    Decoder(kind, scan=scan),
    vera(RANK),
    ["q_einsum", "value", "attn_vec_einsum", "embedder", *feed],
    IDS,
    fused=KEY_VALUE,
  )
  ready.check()
  base = flatten_dict(ready.base(ready.start))
  moved = flatten_dict(ready.merged(ready.moved))
  assert base.keys() == moved.keys()
  q, v, out, table = RANK + 4 * 3, RANK + 2 * 3, RANK + 6, RANK + 6
  block = q + v + out + (RANK + 2 * 8 + RANK + 6 if feed else 0)
  assert adapter_size(ready.adapter, ready.targets) == table + 2 * block
  assert count_layers(ready.targets) == (
    f"{11 if feed else 7} layers: {10 if feed else 6} {kind.__name__}, 1 Embed,"
    " in the parts value"
  )
  shapes = {
    path[-1]: leaf_shapes(ready.adapter, path, target)["vera_b"].shape
    for path, target in ready.targets.items()
  }
  layers = (2,) if scan else ()
  assert shapes["q_einsum"] == (*layers, 12)
  assert shapes["value"] == (*layers, 6)
  changed = {p for p, x in moved.items() if np.abs(x - base[p]).max() > 0}
  assert {p[-2:] for p in changed} == {
    ("q_einsum", "w"),
    ("kv_einsum", "w"),
    ("attn_vec_einsum", "w"),
    ("embedder", "embedding"),
    *([("mlp", "gating_einsum"), ("mlp", "linear")] if feed else []),
  }
  path = next(p for p in changed if p[-2] == "kv_einsum")
  key, value = np.split(moved[path] - base[path], 2, axis=len(layers))
  assert np.abs(key).max() == 0 < np.abs(value).max()


@pytest.mark.parametrize("way", rest_is_slow(WAYS))
def test_convolutions(way):
  """One of them by every plan; the others share what tells the plans apart."""
  plans = PLANS if way == "strided" else ("folded",)
  ready = Ready(Images(way), vera(RANK), ["conv", "one"], IMAGES)
  for found in ready.check(*plans).values():
    ready.check_gradients(found, by_definition)
  taps = {p: t.view.taps for p, t in ready.targets.items()}
  assert taps[("one",)] == 1
  for path, target in ready.targets.items():
    assert adapter_size(vera(RANK), {path: target}) == RANK + target.outputs


@pytest.mark.parametrize("way", rest_is_slow(["dilated", "grouped"]))
def test_convolutions_by_taps(way):
  """The pair is as narrow as a 1 x 1 layer's; each tap has a d of its own."""
  method = vera(RANK, conv="taps")
  ready = Ready(Images(way), method, ["conv", "one"], IMAGES)
  assert ready.projections["A"].shape == (RANK, 6 if way == "grouped" else 4)
  assert ready.start["conv"]["vera_d"].shape == (9 * RANK,)
  assert ready.start["one"]["vera_d"].shape == (RANK,)
  plans = ("folded",) if way == "grouped" else ("factored", "folded")
  for found in ready.check(*plans).values():
    ready.check_gradients(found, by_taps)


def test_a_convolutions_plan_follows_from_its_output_positions():
  """Eight images of 5 x 5 positions, and a thousand of them."""
  view = find_targets(Images("dilated"), ["conv"], IMAGES)["conv",].view
  factors = vera(32).low_rank(
    {"vera_d": jnp.ones(32), "vera_b": jnp.ones(64)},
    SITE._replace(view=view),
  )
  chosen = [choose(n * 25, factors, view=view) for n in (1, 100, 10_000)]
  assert chosen == ["factored", "folded_forward", "folded_forward"]
  few, many = (
    plans_at(lora(64), {("conv",): TARGET._replace(view=view)}, {("conv",): n})
    for n in (25, 250_000)
  )
  assert [*few.values(), *many.values()] == ["factored", "folded"]
  wide = {("conv",): Target(9 * 512, 512, view=view)}
  structured = vera(1024, init="structured")  # no transform is convolved with
  assert plans_at(structured, wide, {("conv",): 2048}) == {("conv",): "folded"}


@pytest.mark.parametrize("plan", PLANS)
def test_a_convolution_is_priced_with_its_matrix_formed(plan):
  """As compiled, within 10 %: lax convolves with no transform of signs."""
  method, x = vera(64, init="structured"), jnp.zeros((1, 10, 10, 16))
  model = adapt(
    nn.Sequential([nn.Conv(96, (3, 3), padding="VALID", use_bias=False)]),
    method,
    targets=["layers_0"],
    plan=plan,
  )
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  (target,) = model.find_targets(x).values()
  params = variables["params"]["layers_0"]
  own = method.own(params)

  def loss(own, x, kernel, projections):
    params = {"layers_0": {"kernel": kernel, **own}}
    y = model.apply({"params": params, "projections": projections}, x)
    return jnp.sum(y**2)

  step = jax.jit(jax.grad(loss, argnums=(0, 1)))
  given = own, x, params["kernel"], variables["projections"]
  flops = step.lower(*given).compile().cost_analysis()["flops"]
  site = Site(("",), *target[:2], lambda: None, shared=variables["projections"])
  priced = costs(64, method.low_rank({}, site), view=target.view)[plan]
  base = 2 * 64 * target.inputs * target.outputs
  assert flops == pytest.approx(2 * (priced + base), rel=0.1)


def test_depthwise_convolutions_are_scaled_alone():
  targets = ["depthwise", "one"]
  both = chain(
    vera(RANK)._replace(on=("one",)), ia3()._replace(on=("depthwise",))
  )
  Ready(Depthwise(), both, targets, IMAGES).check()
  for method in (vera(RANK), lora(2)):
    with pytest.raises(UserError, match=r"depthwise is a depthwise.*by ia3"):
      Ready(Depthwise(), method, targets, IMAGES)


OTHERS = {
  "vera, a pair per layer": METHODS["vera, a pair per layer"].adapter,
  "ia3": ia3(feedforward=("conv", "table", "cell/.*")),
  "dora": METHODS["dora"].adapter,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_on_every_kind(name):
  ready = Ready(Mixed(), OTHERS[name], MIXED, IDS)
  ready.check()
  assert count_layers(ready.targets) == (
    "15 layers: 8 DenseParams, 4 Dense, 1 Embed, 1 Conv, 1 Einsum"
  )


@pytest.mark.parametrize(
  "method",
  [vera(RANK), ia3(feedforward=("conv", "table", "dense"))],
  ids=["vera", "ia3"],
)
def test_a_derived_layers_own_code_is_kept(method):
  """With the bias and IA3's scales inside it. A transformation of flax's layer
  is no code of its own."""
  kept = ("table", "conv", "dense", "heads", "einsum")
  ready = Ready(Derived(), method, [*kept, "remade"], IDS)
  ready.check()
  plans = {name: ready.targets[name,].view.plans for name in kept}
  assert plans == dict.fromkeys(kept, ("folded",))
  assert ready.targets["remade",].view.plans == PLANS


def test_a_layers_own_code_may_do_anything():
  """With the same random numbers, changed variables and values as merged; and
  a layer inside is adapted, too."""
  x = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)
  ready = Ready(Busy(), vera(RANK), ["dense", "einsum", "inside"], x)
  assert len(ready.targets) == 4
  made = {"rngs": {"dropout": jax.random.key(1)}, "mutable": DenyList("params")}
  variables = {"params": ready.moved, "projections": ready.projections}
  y, changed = jax.jit(partial(ready.module.apply, **made))(variables, x)
  del changed["projections"]
  bare = jax.jit(partial(Busy().apply, **made))
  merged = bare({"params": ready.merged(ready.moved)}, x)
  base, _ = bare({"params": ready.base(ready.moved)}, x)
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=0, atol=1e-5), (y, changed), merged
  )
  assert np.abs(y - base).max() > 1e-2


@pytest.mark.parametrize(
  "method", rest_is_slow([ia3(), vera(RANK)]), ids=["ia3", "vera"]
)
def test_a_batch_of_adapters_makes_no_kernel_for_each(method):
  """Factored, as in a bank: on convolutions, tables, equations and cells."""
  targets = [x for x in MIXED if "gates" not in x]
  ready = Ready(Mixed(), method, targets, IDS, plan="factored")
  amounts = jnp.asarray([0.5, -0.4, 0.3, 0.1, 0.2])
  own = {
    path: leaf[None] + jnp.multiply.outer(amounts, jnp.ones(leaf.shape))
    for path, leaf in ready.own(ready.moved).items()
  }

  def run(own):
    return ready.adapted(unflatten_dict(flatten_dict(ready.start) | own))

  if method.name == "vera":
    together = jax.jit(jax.vmap(run))(own)
    alone = jax.jit(run)({path: leaf[1] for path, leaf in own.items()})
    np.testing.assert_allclose(together[1], alone, atol=1e-5)
  program = str(jax.make_jaxpr(jax.vmap(run))(own))
  for kernel in ("7,4]", "3,4,4]", "12,4]", "4,4]", "2,4,3]", "4,6]"):
    assert f"f32[5,{kernel}" not in program


@pytest.mark.parametrize(
  "method, target, message",
  [
    (ia3(feedforward=("conv",)), "conv", r"of conv \(Conv\)"),
    (ia3(feedforward=("table",)), "table", r"of table \(Embed\)"),
    (ia3(), "gates/.*", r"of gates/.* \(DenseParams\)"),
  ],
)
def test_a_bank_refuses_scales_that_need_a_kernel_for_each(
  method, target, message
):
  ready = Ready(Mixed(), method, [target], IDS, plan="factored")
  with pytest.raises(UserError, match=f"{message}.*no factored plan"):
    jax.eval_shape(ready.adapted, ready.moved)


def test_a_tied_output_layer_is_only_folded():
  """It has the adapted table: above, the decoder's logits."""
  ready = Ready(Decoder(CastEinsum), vera(RANK), ["embedder"], IDS)
  with pytest.raises(UserError, match="Embed.*no factored plan"):
    jax.eval_shape(partial(ready.adapted, plan="factored"), ready.moved)


PAIRS = {
  "vera": vera(2, sharing="unique"),
  "lora_fa": lora_fa(2),
  "unilora": unilora(2, size=64, theta_init=1e-9),
}


@pytest.mark.parametrize("way", ["broadcast", "mapped", "mapped cell"])
@pytest.mark.parametrize("method", rest_is_slow(PAIRS))
def test_layers_that_steps_share_have_their_pairs(way, method):
  """The transformation passes on no collection that it does not know."""
  x = jnp.asarray(RNG.normal(size=(3, 2, 4)), jnp.float32)
  Ready(Shared(way), PAIRS[method], [".*"], x).check()


def test_layers_that_get_no_random_numbers_say_so():
  """In training alone, where PVeRA would otherwise draw none without a word."""
  ready = Ready(Shared("stacked"), pvera(2), ["layer"], IMAGES)
  variables = {"params": ready.start, "projections": ready.projections}
  run = partial(ready.module.apply, variables, IMAGES)
  assert jax.eval_shape(run).shape == IMAGES.shape
  with pytest.raises(
    UserError, match="pvera draws .* from layer: .*split_rngs"
  ):
    jax.eval_shape(lambda: run(rngs={KEYS: jax.random.key(0)}))


def test_stacked_layers_with_pairs_need_them_passed_on():
  ready = Ready(Shared("stacked"), PAIRS["vera"], ["layer"], IMAGES)
  with pytest.raises(UserError, match="layers at layer are stacked, and vera"):
    jax.eval_shape(ready.adapted, ready.start)
