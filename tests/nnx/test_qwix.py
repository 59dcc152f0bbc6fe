"""An adapter on a model that qwix quantised is that on the dequantised one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vera_jax
import vera_jax.nnx
from tests.nnx.test_adapt import move
from vera_jax.adapters.methods import adapter_named
from vera_jax.errors import UserError
from vera_jax.nnx.adapt import modules_of
from vera_jax.nnx.layers import value_of

qwix = pytest.importorskip("qwix")

# of flax, about what qwix calls
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKENS = jnp.arange(10).reshape(2, 5)
TARGETS = ["linear", "split", "joined", "flax", "others", "layers"]


class Others(nnx.Module):
  """As tunix's and Gemma's models have it."""

  def __init__(self, equation, shape, rngs):
    self.equation = equation
    self.w = nnx.Param(0.2 * jax.random.normal(rngs.params(), shape))

  def __call__(self, x):
    return jnp.einsum(self.equation, x, self.w[...])


class Model(nnx.Module):
  """One layer of each kind that qwix quantises, and a scanned stack."""

  def __init__(self, rngs=None):
    rngs = rngs or nnx.Rngs(0)
    self.embed = nnx.Embed(11, 32, rngs=rngs)
    self.linear = nnx.Linear(32, 16, rngs=rngs)
    self.split = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
    self.joined = nnx.LinearGeneral((2, 8), 32, axis=(-2, -1), rngs=rngs)
    self.flax = nnx.Einsum("btd,ndh->btnh", (4, 32, 8), (4, 8), rngs=rngs)
    self.others = Others("btnh,nhd->btd", (4, 8, 16), rngs)

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
      return nnx.Linear(16, 16, rngs=rngs)

    self.layers = make(rngs)

  def __call__(self, tokens):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def stack(layer, x):
      return x + jnp.tanh(layer(x))

    x = self.embed(tokens)
    x = x + self.joined(jnp.sin(self.split(jnp.tanh(self.linear(x)))))
    return stack(self.layers, self.others(self.flax(x)))


def quantised(weight="int8", *, path=".*", tile=None, **rule):
  rule = qwix.QuantizationRule(
    module_path=path, weight_qtype=weight, tile_size=tile, **rule
  )
  return qwix.quantize_model(Model(), qwix.PtqProvider([rule]), TOKENS)


def dequantised(model):
  """The plain model with the weights that the codes make."""
  plain = Model()
  for path, module in modules_of(model).items():
    for name, variable in vars(module).items():
      value = value_of(variable)
      if isinstance(value, qwix.QArray):
        value = qwix.dequantize(value)
      if value is not None:
        vars(modules_of(plain)[path])[name].set_value(value)
  return plain


def put_on(model, adapter, targets=TARGETS):
  return vera_jax.nnx.adapt(model, adapter, targets=targets)


def gradients(model):
  @nnx.jit
  def grad(model):
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    return nnx.grad(lambda m: jnp.sin(m(TOKENS)).sum(), argnums=wrt)(model)

  return jax.tree.leaves(grad(model))


def difference(x, y):
  """The largest one, relative to the largest number."""
  return np.abs(x - y).max() / np.abs(y).max()


METHODS = {
  "folded": vera_jax.vera(rank=16),
  "factored": vera_jax.vera(rank=2),
  "unique": vera_jax.vera(rank=4, sharing="unique"),
  "lora": vera_jax.lora(rank=2),
  "lora_xs": vera_jax.lora_xs(rank=2),  # made of the base's weights
  "ia3": vera_jax.ia3(),
  "dora": vera_jax.dora(rank=2),
  "dvora": vera_jax.dvora(rank=4),
  "bitfit": vera_jax.bitfit(),
}
FORMATS = {
  "int8": ("int8", None),
  "int8 tiles": ("int8", 8),
  "int4": ("int4", None),
  "int4 tiles": ("int4", 8),
  "nf4": ("nf4", None),
  "nf4 tiles": ("nf4", 8),
}
CASES = [("int8", "folded")]
MORE = [("nf4 tiles", name) for name in METHODS]
MORE += [(format, "dora") for format in FORMATS if format != "nf4 tiles"]


@pytest.mark.parametrize(
  ("format", "name"),
  CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE],
)
def test_the_base_is_the_dequantised_one(format, name):
  weight, tile = FORMATS[format]
  model = quantised(weight, tile=tile)
  plain = dequantised(model)
  base = model(TOKENS)
  targets = [] if name == "bitfit" else TARGETS
  for one in (model, plain):
    put_on(one, METHODS[name], targets)
  assert difference(model(TOKENS), base) <= 3e-6  # qwix's own product
  for one in (model, plain):
    move(one)
  y = model(TOKENS)
  assert difference(y, base) > 1e-2
  assert difference(y, plain(TOKENS)) <= 3e-6
  assert difference(nnx.jit(lambda m: m(TOKENS))(model), y) <= 3e-6
  pairs = list(zip(gradients(model), gradients(plain), strict=True))
  assert max(difference(*pair) for pair in pairs) <= 3e-6


def test_the_codes_stay_and_come_back(tmp_path):
  model = quantised()
  before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]
  base = model(TOKENS)
  move(put_on(model, METHODS["factored"]))
  frozen = nnx.filterlib.Not(nnx.LoRAParam)
  after = jax.tree.leaves(nnx.state(model, frozen))
  assert [x.dtype for x in before] == [x.dtype for x in after]
  for one, other in zip(before, after, strict=True):
    np.testing.assert_array_equal(one, other)
  assert "5 layers" not in vera_jax.nnx.summary(model)
  assert "split   LinearGeneral  16 × 16" in vera_jax.nnx.summary(model)
  lora = nnx.to_flat_state(vera_jax.nnx.to_lora(model))
  assert dict(lora)["flax", "kernel_lora_b"].shape == (2, 4, 8)
  y = model(TOKENS)
  np.testing.assert_array_equal(nnx.merge(*nnx.split(model))(TOKENS), y)
  np.testing.assert_array_equal(nnx.clone(model)(TOKENS), y)
  vera_jax.nnx.save(tmp_path, model)
  vera_jax.nnx.remove(model)
  np.testing.assert_array_equal(model(TOKENS), base)
  again = vera_jax.nnx.load(tmp_path, quantised())
  np.testing.assert_array_equal(again(TOKENS), y)
  with pytest.raises(UserError, match="trained on other weights"):
    vera_jax.nnx.load(tmp_path, Model())
  # what the message of merge says to do
  with pytest.raises(UserError, match="load it on the plain model with the"):
    vera_jax.nnx.merge(again)
  plain = vera_jax.nnx.load(tmp_path, dequantised(quantised()))
  assert difference(vera_jax.nnx.merge(plain)(TOKENS), y) <= 3e-6


def test_a_merge_leaves_quantised_layers_without_an_adapter():
  model = put_on(quantised(path="linear"), METHODS["lora"], ["flax"])
  merged = vera_jax.nnx.merge(move(model))
  assert isinstance(value_of(vars(merged.linear)["kernel"]), qwix.QArray)
  assert difference(merged(TOKENS), model(TOKENS)) <= 3e-6


def test_quantising_comes_first():
  rule = qwix.QuantizationRule(weight_qtype="int8")
  for model in (Model(), quantised()):
    put_on(model, METHODS["lora"])
    with pytest.raises(UserError, match="quantize_model first, then adapt"):
      qwix.quantize_model(model, qwix.PtqProvider([rule]), TOKENS)


def test_of_qwix_only_the_codes_are_taken():
  def refused(model, match, targets=("linear",)):
    with pytest.raises(UserError, match=match):
      put_on(model, METHODS["lora"], targets)(TOKENS)

  model = quantised(path="linear|others", act_qtype="int8")
  for layer in ("linear", "flax"):  # which has such a rule, and which has none
    refused(nnx.clone(model), r"rule for 'linear\|others' .*act_qtype", [layer])
  rule = qwix.QtRule(module_path="linear", weight_qtype="int8")
  training = qwix.quantize_model(Model(), qwix.QtProvider([rule]), TOKENS)
  refused(nnx.clone(training), "quantises its kernel in each call")
  assert put_on(training, METHODS["lora"], ["flax"])(TOKENS).shape
  rngs = nnx.Rngs(0)  # qwix puts no LoRA on layers that are scanned
  layers = nnx.Linear(32, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
  lora = qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0)
  with_lora = qwix.apply_lora_to_model(
    nnx.Sequential(*layers), lora, jnp.ones((1, 32)), rngs=rngs
  )
  refused(with_lora, "it has qwix's LoRA, kernel_lora_a", [".*1"])
  with pytest.raises(UserError, match="kernel is quantised by qwix: it can't"):
    put_on(quantised(), adapter_named("full"), [])


@pytest.mark.filterwarnings("ignore")  # of tunix's dependencies
def test_a_quantised_model_of_tunix_has_its_twins_names(tmp_path):
  llama = pytest.importorskip("tunix.models.llama3.model")
  with jax.numpy_rank_promotion("allow"):  # as tunix's own code needs it
    _check_tunix(llama, tmp_path)


def _check_tunix(llama, folder):
  config = llama.ModelConfig(
    num_layers=1,
    vocab_size=16,
    embed_dim=8,
    hidden_dim=16,
    num_heads=2,
    head_dim=4,
    num_kv_heads=1,
    norm_eps=1e-5,
    rope_theta=10000,
  )
  positions, mask = jnp.arange(5)[None], jnp.tril(jnp.ones((1, 5, 5), bool))
  inputs = TOKENS[:1], positions, None, mask

  def make():
    rule = qwix.QuantizationRule(module_path=".*proj", weight_qtype="nf4")
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), *inputs)

  model = move(put_on(make(), METHODS["factored"], ["q_proj", "o_proj"]))
  assert ("encoder", "layer_0", "self_attn", "q_proj") in modules_of(model)
  vera_jax.nnx.save(folder, model)
  again = vera_jax.nnx.load(folder, make())
  np.testing.assert_array_equal(again(*inputs)[0], model(*inputs)[0])
