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
from flax.core import DenyList, FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.adapters.architectures import (
  CELLS,
  KEY_VALUE,
  MIXED,
  WAYS,
  Busy,
  Bypassed,
  CastEinsum,
  Decoder,
  Depthwise,
  Derived,
  Einsum,
  Images,
  Mixed,
  Recurrent,
  Tied,
  Twice,
  Unbound,
)
from tests.adapters.test_every_method import METHODS, perturb
from vera_jax.adapters.apply import (
  adapt,
  adapter_size,
  find_targets,
  leaf_shapes,
  plans_at,
)
from vera_jax.adapters.chain import chain
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.intercept import KEYS
from vera_jax.adapters.interface import EMPTY, PLANS, Site, Target
from vera_jax.adapters.lora import lora
from vera_jax.adapters.merge import merge
from vera_jax.adapters.products import choose, costs
from vera_jax.adapters.pvera import pvera
from vera_jax.adapters.sites import count_layers, first_leaves, make_shared
from vera_jax.adapters.tracing import init_shapes, trace_sites
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

RANK = 5  # no layer's width
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, 7, (2, 6)))
IMAGES = jnp.asarray(RNG.normal(size=(2, 5, 6, 4)), jnp.float32)
TARGET = Target(9 * 64, 64)
SITE = Site(
  ("conv",),
  TARGET.inputs,
  TARGET.outputs,
  lambda: jnp.zeros((TARGET.inputs, TARGET.outputs)),
  shared={"A": jnp.ones((32, TARGET.inputs)), "B": jnp.ones((64, 32))},
)
SEQUENCE = jnp.asarray(RNG.normal(size=(3, 6, 2)), jnp.float32)


@partial(jax.jit, static_argnums=0)
def plain(model, params, x):
  """The network without an adapter; compiled once for all methods."""
  return model.apply({"params": params}, x)


class Ready:
  """A method on a network: module, variables, targets, leaves moved away."""

  def __init__(self, model, adapter, targets, x, *, fused=EMPTY, **options):
    self.model, self.adapter, self.x = model, adapter, x
    self.module = adapt(model, adapter, targets=targets, fused=fused, **options)
    shapes = init_shapes(model, x)["params"]
    rng = np.random.default_rng(1)
    base = jax.tree.map(
      lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32),
      shapes,
    )
    self.targets = self.module.find_targets(x)
    self.projections = make_shared(adapter, self.targets, base)
    key = jax.random.key(0)
    made = first_leaves(adapter, self.targets, base, self.projections, key)
    self.start = unflatten_dict(flatten_dict(base) | flatten_dict(made))
    self.moved = perturb(self.start, adapter)

  def own(self, params):
    flat = flatten_dict(params)
    return {p: x for p, x in flat.items() if self.adapter.owns(p[-1])}

  def adapted(self, params, **options):
    module = self.module.clone(**options)
    variables = {"params": params}
    if self.projections:
      variables["projections"] = self.projections
    return module.apply(variables, self.x)

  def base(self, params):
    """The base's part of these parameters."""
    flat = flatten_dict(params)
    return unflatten_dict(
      {p: x for p, x in flat.items() if not self.adapter.owns(p[-1])}
    )

  def merged(self, params):
    return merge(
      params, self.projections, adapter=self.adapter, targets=self.targets
    )

  def check(self, *plans):
    """Equal to the base at the start and to the merged network later.

    Returns:
      By plan, the gradients of the leaves of the outputs' summed sines.
    """

    def loss(own, plan):
      params = unflatten_dict(flatten_dict(self.moved) | own)
      y = self.adapted(params, plan=plan)
      return jnp.sum(jnp.sin(y)), y

    adapted = jax.jit(self.adapted)
    base = plain(self.model, self.base(self.start), self.x)
    merged = plain(self.model, self.merged(self.moved), self.x)
    start = adapted(self.start)
    np.testing.assert_allclose(start, base, rtol=0, atol=1e-6)
    np.testing.assert_allclose(adapted(self.moved), merged, rtol=0, atol=1e-5)
    assert np.abs(merged - base).max() > 1e-2
    found = {}
    for plan in plans:
      gradient = jax.jit(jax.grad(partial(loss, plan=plan), has_aux=True))
      found[plan], y = gradient(self.own(self.moved))
      np.testing.assert_allclose(y, merged, rtol=0, atol=1e-5)
    return found

  def check_gradients(self, found, delta):
    """Against those of the network in float64 with W0 + delta in its place.

    Args:
      found: gradients by leaf.
      delta: (A, B, d, b, kernel's shape) -> what VeRA adds to the kernel.
    """
    with jax.enable_x64(True):
      moved = jax.tree.map(np.float64, flatten_dict(self.moved))
      model = self.model
      if isinstance(model, Recurrent):
        model = model.clone(param_dtype=np.float64)
      A, B = (np.float64(self.projections[name]) for name in "AB")

      def loss(own):
        flat = {**moved, **own}
        for path in self.targets:
          d, b = flat[*path, "vera_d"], flat[*path, "vera_b"]
          kernel = flat[*path, "kernel"]
          flat[*path, "kernel"] = kernel + delta(A, B, d, b, kernel.shape)
        base = {p: x for p, x in flat.items() if not p[-1].startswith("vera")}
        y = model.apply({"params": unflatten_dict(base)}, self.x)
        return jnp.sum(jnp.sin(y))

      expected = jax.jit(jax.grad(loss))({p: moved[p] for p in found})
    for path, gradient in found.items():
      want = expected[path]
      assert want.dtype == np.float64 and np.abs(want).max() > 0
      np.testing.assert_allclose(
        gradient, want, rtol=0, atol=1e-4 * max(1, np.abs(want).max())
      )


def by_definition(A, B, d, b, shape):
  """The kernel as a matrix: A's columns for all taps and channels at once."""
  inputs = int(np.prod(shape[:-1]))
  delta = jnp.einsum("ri,r,or,o->io", A[:, :inputs], d, B[: shape[-1]], b)
  return delta.reshape(shape)


def by_taps(A, B, d, b, shape):
  """Each position of the window with a d of its own."""
  *window, inputs, outputs = shape
  d = d.reshape(*window, -1)
  return jnp.einsum("ri,...r,or,o->...io", A[:, :inputs], d, B[:outputs], b)


@pytest.mark.parametrize(
  "kind, scan, feed",
  [(Einsum, True, ["Einsum_.*"]), (CastEinsum, False, [])],
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


@pytest.mark.parametrize("way", WAYS)
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


@pytest.mark.parametrize("way", ["dilated", "grouped"])
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


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cells(cell):
  """Kernels on the input's side and on the state's alike."""
  ready = Ready(Recurrent(cell), vera(RANK), ["cell/.*"], SEQUENCE)
  gates = {"gru": 3, "simple": 1, "mgu": 2}.get(cell, 4)
  size = adapter_size(ready.adapter, ready.targets)
  assert size == 2 * gates * (RANK + 4)
  (found,) = ready.check("folded").values()
  ready.check_gradients(found, by_definition)


def loops(jaxpr):
  """The operands' shapes of all products inside loops of a program."""
  for equation in jaxpr.eqns:
    inner = [x for x in equation.params.values() if hasattr(x, "jaxpr")]
    for one in inner:
      inside = equation.primitive.name in ("scan", "while")
      yield from products(one.jaxpr) if inside else loops(one.jaxpr)


def products(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield tuple(x.aval.shape for x in equation.invars)
    for one in equation.params.values():
      if hasattr(one, "jaxpr"):
        yield from products(one.jaxpr)


@pytest.mark.parametrize(
  "cell, method",
  [("lstm", vera(RANK)), ("optimised", vera(RANK)), ("gru", lora(RANK))],
  ids=["lstm, vera", "optimised, vera", "gru, lora"],
)
def test_deltas_are_made_before_the_loop_over_time(cell, method):
  """In a step of training no product in a loop is of the rank's width, and
  there are as many as when the kernels themselves are trained."""
  x = jnp.zeros((3, 40, 2))
  ready = Ready(Recurrent(cell), method, ["cell/.*"], x)
  flat = flatten_dict(ready.start)

  def loss(trained, outputs):
    return jnp.sum(outputs(unflatten_dict({**flat, **trained})))

  def in_loops(names, outputs):
    trained = {p: x for p, x in flat.items() if names(p)}
    program = jax.make_jaxpr(jax.grad(partial(loss, outputs=outputs)))(trained)
    return list(loops(program.jaxpr)), list(products(program.jaxpr))

  inside, everywhere = in_loops(lambda p: method.owns(p[-1]), ready.adapted)
  own, _ = in_loops(
    lambda p: p[-1] == "kernel" and "cell" in p,
    lambda params: plain(ready.model, ready.base(params), x),
  )
  assert sorted(inside) == sorted(own) and inside
  assert not any(RANK in shape for pair in inside for shape in pair)
  assert any(RANK in shape for pair in everywhere for shape in pair)


def test_one_step_of_a_cell_is_factored_where_that_is_cheaper():
  """As when a text is written sign by sign; a bank never folds."""
  ready = Ready(Recurrent("gru"), vera(1), ["cell/.*"], SEQUENCE[:1, :1])
  program = str(jax.make_jaxpr(ready.adapted)(ready.moved))
  assert "f32[1,1]" in program  # x times A, of rank 1
  for cell in ("lstm", "optimised"):
    made = Ready(
      Recurrent(cell), vera(RANK, sharing="unique"), ["cell/.*"], SEQUENCE
    )
    if cell == "lstm":
      got = jax.jit(partial(made.adapted, plan="factored"))(made.moved)
      merged = plain(made.model, made.merged(made.moved), SEQUENCE)
      np.testing.assert_allclose(got, merged, rtol=0, atol=1e-5)
    else:
      with pytest.raises(UserError, match="DenseParams.*no factored plan"):
        jax.eval_shape(partial(made.adapted, plan="factored"), made.moved)


@pytest.mark.parametrize("rank, plan", [(RANK, "folded"), (1, "factored")])
def test_a_cells_plan_is_the_one_that_a_run_prints(rank, plan):
  """By the rows of all steps; no delta is made in a step."""
  method, patterns = vera(rank), ["cell/h.*"]
  ready = Ready(Recurrent("gru"), method, patterns, SEQUENCE)
  targets, calls, _ = trace_sites(ready.model, patterns, SEQUENCE)
  tokens = {path: call.tokens for path, call in calls.items()}
  assert set(tokens.values()) == {3 * 6}
  assert set(plans_at(method, targets, tokens).values()) == {plan}
  inside = list(loops(jax.make_jaxpr(ready.adapted)(ready.moved).jaxpr))
  assert (((3, 4), (4, rank)) in inside) == (plan == "factored")
  assert ((4, rank), (rank, 4)) not in inside


def test_random_numbers_in_a_cell():
  """nn.RNN passes keys to its cell only if it is told to."""
  options = FrozenDict(split_rngs=FrozenDict({"params": False, KEYS: True}))
  for cell, given, message in (
    ("gru", FrozenDict(), "pvera draws .* from its cell cell: .*'adapter'"),
    ("optimised", options, "DenseParams .* can only be folded"),
    ("gru", options, None),
  ):
    model = Recurrent(cell, given)
    ready = Ready(model, pvera(RANK), ["cell/.*"], SEQUENCE)
    variables = {"params": ready.moved, "projections": ready.projections}
    run = partial(
      ready.module.apply, variables, SEQUENCE, rngs={KEYS: jax.random.key(1)}
    )
    if message is None:
      still = plain(model, ready.merged(ready.moved), SEQUENCE)
      assert np.abs(jax.jit(run)() - still).max() > 1e-3
    else:
      with pytest.raises(UserError, match=message):
        jax.eval_shape(run)


def test_a_cell_without_random_numbers_in_it_needs_no_keys():
  """PVeRA draws them in another layer of the network."""
  method = chain(
    pvera(RANK)._replace(on=("classifier",)), ia3()._replace(on=("cell/.*",))
  )
  ready = Ready(
    Recurrent("optimised"), method, ["cell/.*", "classifier"], SEQUENCE
  )
  variables = {"params": ready.moved, "projections": ready.projections}
  run = partial(ready.module.apply, variables, SEQUENCE)
  key = jax.random.key(1)
  assert jax.eval_shape(lambda: run(rngs={KEYS: key})).shape == (3, 6, 3)


OTHERS = {
  "vera, a pair per layer": METHODS["vera, a pair per layer"].adapter,
  "ia3": ia3(feedforward=("conv", "table", "cell/.*")),
  "dora": METHODS["dora"].adapter,
}


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


class Renamed(nn.Dense):
  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.features
    return x @ self.param("w", nn.initializers.ones, shape)


def test_a_derived_class_without_the_layers_kernel_is_refused():
  model = nn.Sequential([Renamed(3), nn.Dense(2)])
  with pytest.raises(UserError, match="layers_0: .*no parameter 'kernel'"):
    find_targets(model, ["layers_0"], jnp.ones((2, 4)))


class Named(nn.Dense):
  """Its own call takes a dictionary of arrays."""

  def __call__(self, batch):
    return super().__call__(batch["x"])


def test_a_derived_layer_may_be_called_with_a_dictionary():
  batch = {"x": jnp.ones((2, 4))}
  targets = find_targets(nn.Sequential([Named(3)]), ["layers_0"], batch)
  (target,) = targets.values()
  assert (target.inputs, target.outputs) == (4, 3)


@pytest.mark.parametrize("method", [vera(RANK), ia3()], ids=["vera", "ia3"])
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


@pytest.mark.parametrize(
  "model, target, message",
  [
    (
      Decoder(CastEinsum),
      "gating_einsum",
      "mlp/gating_einsum: its gating_einsum is",
    ),
    (Decoder(CastEinsum), "mlp", "_1/mlp: its gating_einsum is read without"),
    (Bypassed(), "out", "out: it is called only while the model is init"),
    (Tied(), "table", "table: its embedding is also read without a call"),
    (Tied(unbound=True), "table", "table: its embedding is also read without"),
    (Twice(), "turned", "turned: its calls see its kernel in different ways"),
  ],
)
def test_what_calls_do_not_show_is_no_target(model, target, message):
  """The message says why, and lists what else there is."""
  x = IDS if isinstance(model, Decoder | Tied) else jnp.ones((2, 4))
  with pytest.raises(UserError, match=rf"(?s){message}.*adapted are:\n  \w"):
    adapt(model, vera(RANK), targets=[target]).find_targets(x)


def test_every_layer_is_asked_for_without_those_never_called():
  """One pattern names none in particular."""
  found = find_targets(Bypassed(), [".*"], jnp.ones((2, 4)))
  assert ("first",) in found


@pytest.mark.parametrize(
  "model, target, x",
  [
    (Tied(unbound=True), "first", IDS),
    (Unbound(), "layers_0", jnp.ones((2, 4))),
    (Twice(), "last", jnp.ones((2, 4))),
  ],
)
def test_other_layers_beside_what_is_refused(model, target, x):
  """And what a model applies unbound is left alone."""
  ready = Ready(model, vera(RANK), [target], x)
  assert [*ready.targets] == [(target,)]
  ready.check()


class Equation(nn.Module):
  equation: str
  shape: tuple[int, ...]
  more: str = ""

  @nn.compact
  def __call__(self, x):
    y = Multiplied(self.shape, self.more, name="layer")(self.equation, x)
    return nn.Dense(2, name="other")(y.reshape(len(x), -1))


class Multiplied(nn.Module):
  shape: tuple[int, ...]
  more: str

  @nn.compact
  def __call__(self, eqn, x):
    w = self.param("w", nn.initializers.normal(1.0), self.shape)
    y = jnp.einsum(eqn, x, w.swapaxes(0, 1) if self.more == "turned" else w)
    return 3 * y if self.more == "scaled" else y


@pytest.mark.parametrize(
  "equation, shape, reason",
  [
    ("BTD,TDF->BTF", (3, 4, 2), "have T: each entry has a kernel of its own"),
    ("BTD,DF->BF", (4, 2), "is no product of x's rows and a matrix"),
    ("BTD,DFG->BTF", (4, 2, 2), "is no product of x's rows and a matrix"),
    ("BTT,TF->BTF", (4, 2), "an axis is there twice"),
  ],
)
def test_equations_that_are_no_product_of_rows(equation, shape, reason):
  x = jnp.ones((2, 4, 4) if "TT" in equation else (2, 3, 4))
  with pytest.raises(UserError, match=reason):
    find_targets(Equation(equation, shape), ["layer"], x)


@pytest.mark.parametrize("more", ["", "scaled", "turned"])
def test_dots_in_an_equation_and_what_else_a_module_does(more):
  """Of a module that does more than multiply its own call is kept: also where
  a square kernel is turned, which no shape tells."""
  model = Equation("...F,NHF->...NH", (3, 3, 4), more)
  x = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
  ready = Ready(model, vera(RANK), ["layer"], x)
  ready.check()
  view = ready.targets["layer",].view
  assert view.plans == (("folded",) if more else PLANS)
