"""GGUF files against llama.cpp itself, which cyllama brings as a library."""

import json
import os
import random
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tokenizers import Tokenizer

from tests.models.gguf_folders import KINDS, ROWS, TEXTS, random_folder
from vera_jax.export.gguf import write_gguf_of
from vera_jax.models.decoder import logits
from vera_jax.models.family import read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.gguf_file import Written, read_gguf, write_gguf
from vera_jax.models.gguf_tokenizer import RULES, tokenizer_files
from vera_jax.models.hf_weights import load_params
from vera_jax.operations.attention import ACTIVATIONS
from vera_jax.pretrained.blueprint import blueprint

pytestmark = pytest.mark.parity
LENGTH = 24
SIGNS = [
  *"abcXYZ 019.,;:!?'()<=+^~|`$#_\n\t",
  *("  ", "   ", "'s", "'LL", "é", "e\u0301", "你好", "😀", "½", "\u00a0"),
  *("123", "4567", "<end>", "<unk>", "</s>", "the river", "don't", "—", "\r\n"),
]


@pytest.fixture(scope="module")
def load():
  """Opens a file in llama.cpp; its numbers are float32 throughout."""
  library = pytest.importorskip("cyllama.llama.llama_cpp")
  library.disable_logging()

  class Model(library.LlamaModel):
    n_vocab = property(lambda self: self.get_vocab().n_vocab)  # 0.2 asks here

  def load(file: Path):
    params = library.LlamaModelParams()
    params.n_gpu_layers = 0
    return Model(str(file), params), library

  return load


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))


def rewritten(
  file: Path, keys: dict, factors: np.ndarray | None = None
) -> Path:
  """A copy with other keys, with factors for the rotations, in float32.

  With float16 llama.cpp would round what it multiplies with the weights.
  """
  gguf, out = read_gguf(file), file.with_name("odd.gguf")

  def values(name: str) -> np.ndarray:
    return gguf.values(name).astype(np.float32)

  tensors = {
    name: Written("F32", x.shape, partial(values, name))
    for name, x in gguf.tensors.items()
  }
  if factors is not None:
    tensors["rope_freqs.weight"] = Written("F32", (8,), lambda: factors)
  metadata = {**gguf.metadata, **keys}
  kept = {key: value for key, value in metadata.items() if value is not None}
  write_gguf(out, kept, tensors)
  return out


def assert_same_logits(
  file: Path, load, *, length: int = LENGTH, bound: float = 1e-4
) -> None:
  """The logits of one text here and there."""
  ids = np.random.default_rng(0).integers(0, ROWS, length)
  model, library = load(file)
  params = library.LlamaContextParams()
  params.n_ctx = params.n_batch = 64
  params.n_threads = params.n_threads_batch = 1
  params.type_k = params.type_v = params.flash_attn_type = 0  # float32
  context = library.LlamaContext(model, params)
  batch = library.LlamaBatch(n_tokens=length, embd=0, n_seq_max=1)
  for place, i in enumerate(ids):
    batch.add(int(i), place, [0], True)
  context.decode(batch)
  theirs = np.array([context.get_logits_ith(i) for i in range(length)])
  folder = resolve(file)
  made = blueprint(
    read_fields(folder), outputs=1, head="language_modelling", method="head"
  )
  params = load_params(folder, unflatten_dict(made.shapes)).params
  run = jax.jit(partial(made.module.model.apply, {"params": params}))
  ours = np.asarray(logits(run(jnp.asarray(ids[None]))))[0]
  assert np.abs(theirs).max() > 1
  assert np.abs(ours - theirs).max() < bound


def gelu_of_a_table(x):
  """llama.cpp's GELU: of numbers in float16, and rounded to float16."""
  low = x.astype(jnp.float16).astype(x.dtype)
  return jax.nn.gelu(low).astype(jnp.float16).astype(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_we_write(
  kind, load, home, tmp_path, monkeypatch
):
  for name in ("gelu_new", "gelu_pytorch_tanh"):
    monkeypatch.setitem(ACTIVATIONS, name, gelu_of_a_table)
  folder = random_folder(tmp_path / "model", kind, tied=kind != "qwen3")
  write_gguf_of(folder, tmp_path / "a.gguf", kind="gguf-f16")
  # it has no window for a Mistral
  length = 3 if kind == "mistral" else LENGTH
  # a number between two of float16 may fall to either side
  bound = {"gpt2": 5e-4, "gemma3_text": 2e-3}.get(kind, 1e-4)
  file = rewritten(tmp_path / "a.gguf", {})
  assert_same_logits(file, load, length=length, bound=bound)


FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10} | {
  **{"Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30}
}


@pytest.mark.parametrize("format", FTYPES)
def test_values_of_every_format_are_llama_cpp_s(format, load, tmp_path):
  """What it has quantised, dequantised here and there, bit for bit."""
  folder = random_folder(tmp_path / "model", "llama")
  write_gguf_of(folder, tmp_path / "a.gguf", kind="gguf-f16")
  written, rng = read_gguf(tmp_path / "a.gguf"), np.random.default_rng(0)
  tensors = {}
  for name, tensor in written.tensors.items():
    shape = (8, 256) if len(tensor.shape) > 1 else (256,)
    values = rng.standard_normal(shape).astype(np.float32)
    tensors[name] = Written("F32", shape, lambda values=values: values)
  write_gguf(tmp_path / "F32.gguf", written.metadata, tensors)
  _, library = load(tmp_path / "a.gguf")

  def stored_as(file: str, ftype: int, source: str):
    params = library.LlamaModelQuantizeParams()
    params.ftype, params.nthread = ftype, 1
    params.pure = params.allow_requantize = True
    library.model_quantize(str(tmp_path / source), str(tmp_path / file), params)
    return read_gguf(tmp_path / file)

  ours = stored_as("codes.gguf", FTYPES[format], "F32.gguf")
  theirs = stored_as("values.gguf", 0, "codes.gguf")
  assert {x.format for x in ours.tensors.values()} == {format, "F32"}
  for name in tensors:
    here, there = (x.values(name).view(np.uint32) for x in (ours, theirs))
    assert np.array_equal(here, there), name


LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 2.0,
  "high_freq_factor": 3.0,
}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
  "fields",
  [
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, ORIGINAL: 16},
    {"rope_scaling": LLAMA3, ORIGINAL: 64, "rope_theta": 100.0},
  ],
)
def test_llama_cpp_rotates_what_we_write(fields, load, home, tmp_path):
  folder = random_folder(tmp_path / "model", "llama", **fields)
  write_gguf_of(folder, tmp_path / "a.gguf", kind="gguf-f16")
  assert_same_logits(rewritten(tmp_path / "a.gguf", {}), load)


SCALING = "llama.rope.scaling"
FACTORS = np.array([1, 1, 2, 3, 5, 8, 8, 8.5], np.float32)


@pytest.mark.parametrize(
  "keys, factors",
  [
    ({f"{SCALING}.factor": 4.0}, None),
    ({"llama.rope.scale_linear": 4.0}, None),
    ({"llama.rope.scale_linear": 4.0, f"{SCALING}.factor": 0.0}, None),
    ({f"{SCALING}.type": "none", f"{SCALING}.factor": 4.0}, FACTORS),
    ({f"{SCALING}.type": "linear", f"{SCALING}.factor": 4.0}, FACTORS),
    ({f"{SCALING}.type": "yarn", f"{SCALING}.factor": 4.0}, None),
  ],
)
def test_rotations_of_others_are_llama_cpp_s(
  keys, factors, load, home, tmp_path
):
  folder = random_folder(tmp_path / "model", "llama")
  write_gguf_of(folder, tmp_path / "a.gguf", kind="gguf-f16")
  assert_same_logits(rewritten(tmp_path / "a.gguf", keys, factors), load)


def texts(signs: list[str] = SIGNS, count: int = 300) -> list[str]:
  rng = random.Random(0)
  odd = (rng.choices(signs, k=rng.randint(1, 14)) for _ in range(count))
  return [*TEXTS, *map("".join, odd)]


TEXTS_300 = texts()


def their_ids(file: Path, load, texts: list[str] = TEXTS_300):
  model, _ = load(file)
  vocabulary = model.get_vocab()
  return [list(vocabulary.tokenize(x, True, True)) for x in texts]


def our_tokenizer(file: Path) -> Tokenizer:
  files = tokenizer_files(read_gguf(file).metadata, source=file)
  return Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


def our_ids(file: Path, texts: list[str] = TEXTS_300) -> list[list[int]]:
  made = our_tokenizer(file)
  return [made.encode(x).ids for x in texts]


@pytest.fixture(scope="module")
def words(glue_folder, tmp_path_factory) -> Path:
  """A file with GPT-2's vocabulary."""
  source = glue_folder.parent / "tokenizers/gpt2/tokenizer.json"
  if not source.is_file():
    pytest.skip("GPT-2's tokenizer is not beside the checkout")
  place = tmp_path_factory.mktemp("words")
  ends = {"bos_token_id": 50256, "eos_token_id": 50256}
  folder = random_folder(place / "model", "llama", rows=50257, **ends)
  (folder / "tokenizer.json").write_bytes(source.read_bytes())
  (folder / "tokenizer_config.json").unlink()
  write_gguf_of(folder, place / "a.gguf", kind="gguf-q8_0")
  return place / "a.gguf"


@pytest.mark.parametrize("rule", [names[0] for names in RULES.values()])
def test_byte_level_ids_are_llama_cpp_s(rule, words, load):
  file = rewritten(words, {"tokenizer.ggml.pre": rule})
  assert our_ids(file) == their_ids(file, load)


@pytest.mark.parametrize("key", ["", "add_space_prefix", "add_eos_token"])
def test_scored_ids_are_llama_cpp_s(key, load, glue_folder, tmp_path):
  source = glue_folder.parent / "checkpoints/stories260K"
  if not source.is_dir():
    pytest.skip("stories260K is not beside the checkout")
  write_gguf_of(source, tmp_path / "a.gguf", kind="gguf-f16")
  name = f"tokenizer.ggml.{key}"
  value = read_gguf(tmp_path / "a.gguf").metadata.get(name)
  keys = {} if value is None else {name: not value}
  file = rewritten(tmp_path / "a.gguf", keys)
  assert our_ids(file) == their_ids(file, load)


GEMMA = Path("networks/gemma-3-270m-q4_k_m.gguf")
# Runs that are tokens of their own, and what a vocabulary has no token for.
MORE_SIGNS = [
  *("<bos>", "<start_of_turn>", "<unused9>", "<0x0A>", "</td>", "▁", "\ufeff"),
  *(" " * 40, "\n" * 33, "\t\t", "_____", "aaaaa", "한국어", "مرحبا", "नमस्ते"),
  *(
    "👩\u200d👩\u200d👧",
    "ﬁ",
    "\ue000",
    "\U000f0000",
    "\x7f",
    "\u3042",
    "\u0e01",
  ),
]


def test_gemma_s_ids_of_odd_texts_are_llama_cpp_s(load):
  if not GEMMA.is_file():
    pytest.skip("make gemma brings the file")
  rng = random.Random(1)
  drawn = [chr(rng.randrange(1, 0x3000)) for _ in range(400)]
  odd = texts([*SIGNS, *MORE_SIGNS, *drawn], 1000)
  assert our_ids(GEMMA, odd) == their_ids(GEMMA, load, odd)


# Of its source's files, whose tokenizers are read here.
VOCABULARIES = (
  *("command-r", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2"),
  *("refact", "starcoder"),
)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_llama_cpp_s_own_vocabulary_tests(name):
  source = os.environ.get("LLAMA_CPP_SOURCE")
  if not source:
    pytest.skip("LLAMA_CPP_SOURCE names no folder with llama.cpp's source")
  file = Path(source, "models", f"ggml-vocab-{name}.gguf")
  odd = Path(f"{file}.inp").read_bytes().decode()
  odd = odd.split("\n__ggml_vocab_test__\n")
  lines = Path(f"{file}.out").read_text().split("\n")
  made = our_tokenizer(file)
  for text, line in zip(odd, lines, strict=False):
    ids = made.encode(text, add_special_tokens=False).ids
    assert ids == [int(word) for word in line.split()], repr(text)
