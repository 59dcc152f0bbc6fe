"""Every key of a GGUF header: used, without effect, or refused by its name."""

import numpy as np
import pytest

from tests.models.gguf_folders import random_folder
from vera_jax.errors import UserError
from vera_jax.export.gguf import write_gguf_of
from vera_jax.models.family import config_of
from vera_jax.models.gguf_file import Gguf, Tensor, read_gguf
from vera_jax.models.gguf_folder import Tensors, config_fields
from vera_jax.models.gguf_keys import GPT2, ROTATING, TOKENIZER
from vera_jax.models.gguf_tokenizer import tokenizer_files

TABLES = {
  "llama.": ROTATING,
  "gpt2.": GPT2,
  "tokenizer.ggml.": TOKENIZER,
}
FIXED = [
  (prefix, name, values)
  for prefix, keys in TABLES.items()
  for name, values in keys.fixed.items()
  if prefix != "gpt2."  # whose are the same
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Gguf:
  place = tmp_path_factory.mktemp("llama")
  folder = random_folder(place / "model", "llama")
  write_gguf_of(folder, place / "a.gguf", kind="gguf-f16")
  return read_gguf(place / "a.gguf")


def with_keys(gguf: Gguf, keys: dict) -> Gguf:
  """The file with further keys; None takes one out."""
  metadata = {**gguf.metadata, **keys}
  kept = {key: x for key, x in metadata.items() if x is not None}
  return gguf._replace(metadata=kept)


def with_factors(gguf: Gguf, factors: np.ndarray) -> Gguf:
  """The file with a tensor of factors for its rotations."""
  data = (*gguf.data, factors.view(np.uint8))
  place = Tensor(factors.shape, "F32", 0, factors.nbytes, part=1)
  tensors = {**gguf.tensors, "rope_freqs.weight": place}
  return gguf._replace(tensors=tensors, data=data)


@pytest.mark.parametrize("prefix, name, values", FIXED)
def test_a_key_that_changes_something_is_refused_by_name(
  prefix, name, values, caplog
):
  key = prefix + name.replace("*", "x")
  for value in (*values, []):
    TABLES[prefix].check({key: value}, prefix=prefix, source="a.gguf")
  for value in (0.75, 7, "other", [0.75], np.array([3, 4])):
    with pytest.raises(UserError, match=f"a.gguf: its {key} is not known"):
      TABLES[prefix].check({key: value}, prefix=prefix, source="a.gguf")
  assert not caplog.messages


@pytest.mark.parametrize("prefix, keys", TABLES.items())
def test_unknown_keys_are_named_once_and_others_are_not(prefix, keys, caplog):
  known = dict.fromkeys(map(prefix.__add__, keys.used | keys.unused), 0.75)
  elsewhere = {"general.name": 1, "gemma.attention.causal": False}
  keys.check(known | elsewhere, prefix=prefix, source="b.gguf")
  assert not caplog.messages
  odd = {f"{prefix}odd": 1, f"{prefix}even.more": 2}
  for _ in range(2):
    keys.check(known | odd, prefix=prefix, source="b.gguf")
  (message,) = caplog.messages
  assert "b.gguf has keys that are not known here" in message
  assert f"{prefix}odd, {prefix}even.more." in message


def test_the_keys_of_a_file_are_looked_at(llama, caplog):
  odd = {"llama.logit_scale": 0.5, "tokenizer.ggml.normalizer.lowercase": True}
  for key, value in odd.items():
    with pytest.raises(UserError, match=key):
      Tensors(with_keys(llama, {key: value}))
  with pytest.raises(UserError, match="lowercase"):
    tokenizer_files({**llama.metadata, **odd}, source="a.gguf")
  Tensors(with_keys(llama, {"llama.x": 1, "tokenizer.ggml.y": 2}))
  network, tokenizer = caplog.messages
  assert "llama.x." in network and "tokenizer.ggml.y." in tokenizer


def rotations(gguf: Gguf) -> tuple[np.ndarray, float]:
  """What a file's rotations divide the plain frequencies by, and the scale."""
  config = config_of(config_fields(gguf))
  plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
  return plain / np.array(config.frequencies), config.rotation_scale


EACH = np.array([1, 1, 2, 3, 5, 8, 8, 8.5], np.float32)
SCALING = "llama.rope.scaling"
# The keys, whether the tensor is there, and what llama.cpp divides by.
ROTATIONS = [
  ({f"{SCALING}.factor": 4.0}, False, 4),  # without a type
  ({f"{SCALING}.factor": 4.0, f"{SCALING}.type": "linear"}, False, 4),
  ({f"{SCALING}.factor": 4.0, f"{SCALING}.type": "none"}, False, 1),
  ({f"{SCALING}.factor": 0.0}, False, 1),
  ({f"{SCALING}.factor": 0.5}, False, 0.5),
  ({"llama.rope.scale_linear": 4.0}, False, 4),  # the old key
  ({"llama.rope.scale_linear": 4.0, f"{SCALING}.factor": 2.0}, False, 2),
  ({"llama.rope.scale_linear": 4.0, f"{SCALING}.factor": 0.0}, False, 1),
  ({}, True, EACH),
  ({f"{SCALING}.type": "none", f"{SCALING}.factor": 4.0}, True, EACH),
  ({f"{SCALING}.type": "linear", f"{SCALING}.factor": 4.0}, True, 4 * EACH),
  ({"llama.rope.scale_linear": 2.0}, True, 2 * EACH),
]


@pytest.mark.parametrize("keys, factors, expected", ROTATIONS)
def test_rotations_are_llama_cpp_s(keys, factors, expected, llama):
  gguf = with_factors(llama, EACH) if factors else llama
  found, scale = rotations(with_keys(gguf, keys))
  np.testing.assert_allclose(found, np.broadcast_to(expected, 8), rtol=1e-6)
  assert scale == 1


def test_yarn_without_an_old_length_stretches_the_whole_context(llama):
  yarn = {f"{SCALING}.factor": 4.0, f"{SCALING}.type": "yarn"}
  original = f"{SCALING}.original_context_length"
  found, scale = rotations(with_keys(llama, yarn))
  expected, _ = rotations(with_keys(llama, {**yarn, original: 32}))
  other, _ = rotations(with_keys(llama, {**yarn, original: 16}))
  assert np.array_equal(found, expected) and not np.array_equal(found, other)
  assert scale == pytest.approx(1 + 0.1 * np.log(4))
  with pytest.raises(UserError, match="of the type yarn with rope_freqs"):
    config_fields(with_keys(with_factors(llama, EACH), yarn))


@pytest.mark.parametrize(
  "factors", [EACH[:4], EACH * 0, EACH * np.float32("nan"), -EACH]
)
def test_factors_that_are_none_are_refused(factors, llama):
  with pytest.raises(UserError, match="not one positive number for each of 8"):
    config_fields(with_factors(llama, factors))


ODD_SIZES = [
  ({"llama.attention.key_length": 2 * 10**9}, "heads of 2000000000"),
  (
    {
      f"llama.{key}": 2 * 10**9
      for key in (
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
      )
    },
    r"attn_q.weight' has the shape \(64, 64\)",
  ),
  ({"llama.feed_forward_length": 10**9}, "ffn_up.weight' has the shape"),
  ({"llama.attention.head_count_kv": 4}, "attn_k.weight' has the shape"),
  ({"llama.rope.scaling.factor": float("inf")}, "has the factor inf"),
  ({"llama.rope.scaling.factor": -1.0}, "has the factor -1"),
  ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens and an embedding of 48 rows"),
]


@pytest.mark.parametrize("keys, words", ODD_SIZES)
def test_sizes_are_those_of_the_tensors(keys, words, llama):
  with pytest.raises(UserError, match=words):
    config_fields(with_keys(llama, keys))


def test_tensors_are_just_those_of_the_architecture(llama):
  tensors = dict(llama.tensors)
  bias = tensors["output_norm.weight"]._replace(shape=(64,))
  for more, words in (
    ({"blk.0.attn_q.bias": bias}, "lacks the tensor 'blk.0.attn_k.bias'"),
    ({"blk.0.attn_q_norm.weight": bias}, "no place .* 'blk.0.attn_q_norm"),
    ({"output_norm.bias": bias}, "no place here for its tensor 'output_norm.b"),
    ({"output.bias": bias}, "no place here for its tensor 'output.bias'"),
  ):
    with pytest.raises(UserError, match=words):
      config_fields(llama._replace(tensors={**tensors, **more}))
  del tensors["blk.1.ffn_up.weight"]
  with pytest.raises(UserError, match="lacks the tensor 'blk.1.ffn_up.weight'"):
    config_fields(llama._replace(tensors=tensors))


def test_several_ends_are_named(llama):
  keys = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 4}
  end = llama.metadata["tokenizer.ggml.eos_token_id"]
  fields = config_fields(with_keys(llama, keys))
  assert fields["eos_token_id"] == [end, 3, 4]
  fields = config_fields(with_keys(llama, {"tokenizer.ggml.eot_token_id": end}))
  assert fields["eos_token_id"] == end


@pytest.mark.parity
def test_the_tables_have_all_keys_of_the_gguf_package():
  gguf = pytest.importorskip("gguf")

  def texts(group: type) -> list[str]:
    parts = [x for name, x in vars(group).items() if not name.startswith("_")]
    inner = [key for x in parts if isinstance(x, type) for key in texts(x)]
    return inner + [x for x in parts if isinstance(x, str)]

  keys = texts(gguf.Keys)
  assert len(keys) > 150
  for prefix, table in TABLES.items():
    general = "tokenizer.ggml." if table is TOKENIZER else "{arch}."
    names = [key.removeprefix(general) for key in keys if general in key]
    for name in set(names) - table.used - table.unused:
      key = prefix + name.replace("{dense}", "dense_2")
      with pytest.raises(UserError, match="is not known here"):
        table.check({key: 7}, prefix=prefix, source="a.gguf")
