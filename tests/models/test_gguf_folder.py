"""A GGUF file as a folder and back: names, rows, config, tokenizer, cache."""

import hashlib
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from tests.experiments.command import run
from tests.models.gguf_folders import (
  KINDS,
  ROWS,
  TEXTS,
  byte_level,
  random_folder,
  tensors_of,
)
from tests.slow import rest_is_slow
from vera_jax import load_adapter, restore_adapter
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.export.gguf import write_gguf_of
from vera_jax.export.hf import merged_params
from vera_jax.models.family import config_of, load_config, read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.gguf_file import Written, read_gguf, write_gguf
from vera_jax.models.gguf_folder import (
  config_fields,
  from_pairs,
  open_tensors,
  to_pairs,
)
from vera_jax.models.gguf_tokenizer import (
  RULES,
  tokenizer_files,
  tokenizer_metadata,
)
from vera_jax.models.hf_weights import fingerprint, load_params
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import load_classifier

FAMILIES = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home of its own, where the cache is."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  return tmp_path / "home"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes a decoder's folder, once for each kind."""
  made = {}

  def make(kind):
    if kind not in made:
      place = tmp_path_factory.mktemp(kind)
      made[kind] = random_folder(place / "model", kind, tied=kind != "qwen3")
    return made[kind]

  return make


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
  """Makes a decoder's GGUF file, once for each kind and format."""
  made = {}

  def make(kind, format="gguf-f16"):
    if (kind, format) not in made:
      place = tmp_path_factory.mktemp(kind) / f"{kind}.gguf"
      write_gguf_of(folder(kind), place, kind=format)
      made[kind, format] = place
    return made[kind, format]

  return make


def test_rows_in_pairs_become_halves():
  rows = np.arange(16)
  expected = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
  assert from_pairs(rows.astype(np.float32), heads=2).tolist() == expected
  values = np.random.default_rng(0).standard_normal((24, 5))
  assert np.array_equal(from_pairs(to_pairs(values, heads=3), heads=3), values)


def test_a_llama_s_query_and_key_rows_are_in_pairs_and_no_others(folder, file):
  theirs = load_file(folder("llama") / "model.safetensors")
  ours = read_gguf(file("llama"))
  for name, module, heads in (
    ("attn_q", "self_attn.q_proj", 4),
    ("attn_k", "self_attn.k_proj", 2),
    ("attn_v", "self_attn.v_proj", None),
  ):
    values = theirs[f"model.layers.1.{module}.weight"]
    found = ours.values(f"blk.1.{name}.weight").astype(np.float32)
    assert np.array_equal(found, values) == (heads is None)
    if heads:
      assert np.array_equal(from_pairs(found, heads=heads), values)
  qwen = read_gguf(file("qwen2"))
  theirs = load_file(folder("qwen2") / "model.safetensors")
  for leaf in ("weight", "bias"):
    values = theirs[f"model.layers.0.self_attn.q_proj.{leaf}"]
    found = qwen.values(f"blk.0.attn_q.{leaf}")
    assert np.array_equal(found.astype(np.float32), values)


@FAMILIES
def test_tensors_and_config_come_back(kind, folder, file):
  theirs = load_file(folder(kind) / "model.safetensors")
  ours = open_tensors(file(kind))
  assert set(ours.keys()) == theirs.keys()
  for name, values in theirs.items():
    header, found = ours.get_slice(name), ours.get_tensor(name)
    assert tuple(header.get_shape()) == found.shape == values.shape
    assert header.get_dtype() == ("F32" if values.ndim == 1 else "F16")
    assert np.array_equal(found.astype(np.float32), values), name
  given, found = read_fields(folder(kind)), config_fields(ours.gguf)
  rest = {name for name in given if found.get(name) != given[name]}
  assert not rest, (rest, found)


@FAMILIES
def test_a_family_reads_a_file_as_the_folder(kind, folder, file, home):
  loaded, places = [], (folder(kind), resolve(file(kind)))
  first, second = map(load_config, places)
  assert second == first and first.model_type == kind
  for name in places:
    made = blueprint(
      read_fields(name), outputs=1, head="language_modelling", method="head"
    )
    found = load_params(name, unflatten_dict(made.shapes))
    assert not found.missing and not found.unexpected
    loaded.append(found.params)
  equal = jax.tree.map(np.array_equal, *loaded)
  assert all(jax.tree.leaves(equal)) and jax.tree.leaves(equal)


def test_a_model_in_parts_is_the_model(file, home, tmp_path):
  model = read_gguf(file("llama"))
  names, firsts = list(model.tensors), [0, 7, 15, None]
  for i in range(3):
    keys = {"split.no": i, "split.count": 3, "split.tensors.count": len(names)}
    tensors = {
      name: Written(x.format, x.shape, partial(model.values, name))
      for name, x in model.tensors.items()
      if name in names[slice(*firsts[i : i + 2])]
    }
    keys |= model.metadata if i == 0 else {}
    write_gguf(tmp_path / f"a-0000{i + 1}-of-00003.gguf", keys, tensors)
  first = tmp_path / "a-00001-of-00003.gguf"
  one, parts = resolve(file("llama")), resolve(first)
  assert read_fields(one) == read_fields(parts)
  one, two = (open_tensors(x / "model.gguf") for x in (one, parts))
  assert one.keys() == two.keys()
  for name in one.keys():
    assert np.array_equal(one.get_tensor(name), two.get_tensor(name))
  # a change of any part is a change of the base, and of its folder
  before, last = fingerprint(parts), tmp_path / "a-00003-of-00003.gguf"
  changed = bytearray(last.read_bytes())
  changed[-1] ^= 1
  last.write_bytes(changed)
  assert fingerprint(parts) != before
  assert resolve(first) != parts


def test_rows_that_are_no_whole_blocks_are_f16(tmp_path):
  place = random_folder(tmp_path / "model", "llama")
  tensors = load_file(place / "model.safetensors")
  for i in range(2):
    for name in ("gate_proj", "up_proj"):
      name = f"model.layers.{i}.mlp.{name}.weight"
      tensors[name] = tensors[name][:40]
    name = f"model.layers.{i}.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :40])
  save_file(tensors, place / "model.safetensors")
  fields = {**read_fields(place), "intermediate_size": 40}
  (place / "config.json").write_text(json.dumps(fields))
  out = tmp_path / "a.gguf"
  assert write_gguf_of(place, out, kind="gguf-q8_0") == {
    "F32": 5,
    "F16": 2,
    "Q8_0": 13,
  }
  assert read_gguf(out).tensors["blk.0.ffn_down.weight"].format == "F16"
  with pytest.raises(UserError, match="is there already"):
    write_gguf_of(place, out, kind="gguf-q8_0")


SCALINGS = [
  {"rope_type": "linear", "factor": 4.0},
  {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 16,
  },
  {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  },
]


# config.json's fields, of which the file gives the same rotations back.
ORIGINAL = "original_max_position_embeddings"
ROTATIONS = [
  {"hidden_act": "swish"},  # which is silu
  {"rope_scaling": {**SCALINGS[2], "low_freq_factor": 2.0, ORIGINAL: 64}},
  {"rope_scaling": {**SCALINGS[2], "high_freq_factor": 16.0}, ORIGINAL: 256},
  {"rope_scaling": {**SCALINGS[2], ORIGINAL: None}, "rope_theta": None},
  {"rope_scaling": {"type": "yarn", "factor": 2.0}, ORIGINAL: 8},
  {"rope_parameters": {"rope_type": "yarn", ORIGINAL: 8}},
  {"rope_scaling": {"type": "linear", "factor": 3}, "rope_theta": None},
]


@pytest.mark.parametrize("given", ROTATIONS)
def test_what_is_written_has_the_same_rotations(given, tmp_path):
  place = random_folder(tmp_path / "model", "llama", **given)
  write_gguf_of(place, tmp_path / "a.gguf", kind="gguf-f16")
  fields = config_fields(read_gguf(tmp_path / "a.gguf"))
  found, expected = config_of(fields), load_config(place)
  np.testing.assert_allclose(found.frequencies, expected.frequencies, rtol=1e-6)
  assert found.rotation_scale == pytest.approx(expected.rotation_scale)
  # and once more, from what was read
  (place / "config.json").write_text(json.dumps(fields))
  write_gguf_of(place, tmp_path / "b.gguf", kind="gguf-f16")
  assert config_fields(read_gguf(tmp_path / "b.gguf")) == fields


def rewritten(file, out, *, tensors=None, **metadata):
  """A copy of a file with other metadata and further tensors."""
  gguf = read_gguf(file)
  kept = {
    name: Written(x.format, x.shape, lambda name=name: gguf.values(name))
    for name, x in gguf.tensors.items()
  }
  more = {
    name: Written("F32", x.shape, lambda x=x: x)
    for name, x in (tensors or {}).items()
  }
  about = gguf.metadata | {k.replace("__", "."): v for k, v in metadata.items()}
  about = {key: value for key, value in about.items() if value is not None}
  write_gguf(out, about, {**kept, **more})
  return out


REFUSED = [
  ({"general__architecture": "gemma2"}, "its architecture is 'gemma2'"),
  ({"llama__block_count": 3}, "holds 2 layers of width 64, not the 3"),
  ({"llama__embedding_length": 32}, "not the 2 of width 32"),
  ({"llama__attention__head_count": 5}, "doesn't divide into 5 heads"),
  ({"llama__attention__head_count_kv": 0}, "4 heads and 0 of keys"),
  ({"llama__attention__key_length": 15}, "15 with"),
  ({"llama__rope__freq_base": float("nan")}, "llama.rope.freq_base: nan"),
  ({"llama__attention__head_count": None}, "no usable llama.attention.head"),
  ({"llama__context_length": "long"}, "no usable llama.context_length: 'long'"),
  ({"llama__expert_count": 8}, "has experts"),
  ({"llama__rope__dimension_count": 8}, "16 with 8 rotated values"),
  ({"llama__rope__scaling__type": "longrope"}, "'longrope' is not known"),
  ({"llama__rope__scaling__type": "linear"}, "rope.scaling lacks a value"),
  ({"llama__rope__scaling__attn_factor": 2.0}, "attn_factor is not known"),
  ({"tokenizer__ggml__model": "bert"}, "its tokenizer is 'bert'"),
  ({"tokenizer__ggml__pre": "tekken"}, "by the rule 'tekken'"),
  ({"tokenizer__ggml__eos_token_id": 99}, "beyond its 48 tokens"),
  ({"tokenizer__ggml__merges": ["t q"]}, "don't fit together"),
  ({"tokenizer__ggml__merges": ["t"]}, "don't fit together"),
  ({"tokenizer__ggml__tokens": ["a"] * 48}, "tokens are there twice"),
  ({"tokenizer__ggml__model": "llama"}, "its tokens have no scores"),
  (
    {"tensors": {"blk.0.ffn_gate_inp.weight": np.zeros((2, 2), np.float32)}},
    "no place here for its tensor 'blk.0.ffn_gate_inp.weight'",
  ),
]


@pytest.mark.parametrize("changes, words", REFUSED)
def test_what_is_not_known_is_refused(changes, words, file, tmp_path, home):
  odd = rewritten(file("llama"), tmp_path / "odd.gguf", **changes)
  with pytest.raises(UserError, match=words) as error:
    resolve(odd)
  assert "odd.gguf" in str(error.value)
  cache = home / ".cache/vera_jax/gguf"
  assert not cache.exists() or not list(cache.iterdir())


def test_a_file_gets_one_folder_for_its_content_and_place(file, tmp_path, home):
  first = tmp_path / "a.gguf"
  shutil.copy(file("llama"), first)
  place = resolve(first)
  cache = home / ".cache/vera_jax/gguf"
  assert [x.name for x in cache.iterdir()] == [place.name]
  assert place.name.startswith("a-")
  sha = hashlib.sha256(first.read_bytes()).digest()
  assert fingerprint(place) == hashlib.sha256(sha).hexdigest()
  # small files only: the weights are not copied
  assert sum(x.lstat().st_size for x in place.iterdir()) < 20_000
  before = (place / "config.json").stat().st_mtime_ns
  assert resolve(str(first)) == place
  assert (place / "config.json").stat().st_mtime_ns == before
  second = tmp_path / "moved.gguf"
  first.rename(second)
  moved = resolve(second)
  assert moved != place and fingerprint(moved) == (
    hashlib.sha256(sha).hexdigest()
  )
  with pytest.raises(UserError, match="There is no file"):
    resolve(first)
  rewritten(second, first, general__name="other")
  other = resolve(first)  # of the same name, with other content
  assert other not in (place, moved) and fingerprint(other) != (
    fingerprint(moved)
  )
  assert len(list(cache.iterdir())) == 3


def test_a_file_in_a_package_is_found(file, tmp_path, home, monkeypatch):
  about = tmp_path / "some_model-1.0.dist-info"
  about.mkdir()
  (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-model\n")
  (about / "RECORD").write_text("some_model/tiny.gguf,,\n")
  (tmp_path / "some_model").mkdir()
  shutil.copy(file("llama"), tmp_path / "some_model/tiny.gguf")
  (tmp_path / "some_model/other.gguf").write_bytes(b"")
  monkeypatch.syspath_prepend(str(tmp_path))
  expected = resolve(tmp_path / "some_model/tiny.gguf")
  for name in ("some-model", "some_model"):
    assert resolve(f"package:{name}/tiny.gguf") == expected
    with pytest.raises(UserError, match="nor a GGUF file of that name"):
      resolve(f"package:{name}/other.gguf")  # not in the list of files


@pytest.mark.parametrize("rule", rest_is_slow(RULES, quick=2))
def test_ids_are_the_same_after_every_rule(rule, folder, tmp_path):
  place = tmp_path / "model"
  shutil.copytree(folder("llama"), place)
  end = byte_level(place, rule) - 1
  about = tokenizer_metadata(place, rows=ROWS)
  assert about["tokenizer.ggml.pre"] == RULES[rule][0]
  out = tmp_path / "again"
  out.mkdir()
  for name, value in tokenizer_files(about, source=out).items():
    (out / name).write_text(json.dumps(value))
  (out / "config.json").write_text((place / "config.json").read_text())
  before, after = load_tokenizer(place), load_tokenizer(out)
  for text in TEXTS:
    assert after(text)["input_ids"] == before(text)["input_ids"], text
  assert len(after) == len(before)
  assert (after.eos_token_id, after.bos_token_id) == (end, None)
  assert after.decode(after(TEXTS[2])["input_ids"]) == TEXTS[2]
  kept = after.decode(after(TEXTS[2])["input_ids"], skip_special_tokens=True)
  assert kept == "the<note>river"
  chat = [{"role": "user", "content": "run"}]
  assert after.apply_chat_template(chat, tokenize=False) == "run<end>"
  assert tokenizer_metadata(out, rows=ROWS).keys() == about.keys()


def test_texts_start_and_end_as_the_header_says(folder, tmp_path):
  about = tokenizer_metadata(folder("llama"), rows=ROWS)
  assert about["tokenizer.ggml.add_bos_token"] is False
  about |= {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": True,
  }
  for name, value in tokenizer_files(about, source="a.gguf").items():
    (tmp_path / name).write_text(json.dumps(value))
  (tmp_path / "config.json").write_text("{}")
  made = load_tokenizer(tmp_path)
  plain = load_tokenizer(folder("llama"))("the")["input_ids"]
  assert made("the")["input_ids"] == [1, *plain, 2]
  again = tokenizer_metadata(tmp_path, rows=ROWS)
  assert again["tokenizer.ggml.add_bos_token"]
  assert again["tokenizer.ggml.add_eos_token"]


def test_sentencepiece_scores_give_the_merges_back(tmp_path):
  from tokenizers import Tokenizer

  tokens = ["<unk>", "<s>", "</s>", "<0x21>", "▁", "t", "h", "e", "a"]
  tokens += ["▁t", "he", "▁the", "at", "▁a"]
  about = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": -np.arange(14, dtype=np.float32),
    "tokenizer.ggml.token_type": np.array([2, 3, 3, 6] + [1] * 10, np.int32),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
  }
  files = tokenizer_files(about, source="a.gguf")
  for name, value in files.items():
    (tmp_path / name).write_text(json.dumps(value))
  (tmp_path / "config.json").write_text("{}")
  made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  # the best-scored neighbours first: "he" before "▁the", "at" before "▁a"
  for text, expected in (
    ("the", ["<s>", "▁the"]),
    ("eat", ["<s>", "▁", "e", "at"]),
    ("at  a!", ["<s>", "▁", "at", "▁", "▁a", "<0x21>"]),
  ):
    assert made.encode(text).tokens == expected
    assert made.decode(made.encode(text).ids) == text
  again = tokenizer_metadata(tmp_path, rows=16)
  assert again["tokenizer.ggml.tokens"] == [*tokens, "[PAD14]", "[PAD15]"]
  assert again["tokenizer.ggml.add_bos_token"]
  types = about["tokenizer.ggml.token_type"].tolist()
  assert again["tokenizer.ggml.token_type"].tolist() == [*types, 5, 5]
  second = tokenizer_files(again, source="a.gguf")
  assert (
    second["tokenizer.json"]["model"]["merges"]
    == (files["tokenizer.json"]["model"]["merges"])
  )
  with pytest.raises(UserError, match="beyond the embedding's 13 rows"):
    tokenizer_metadata(tmp_path, rows=13)


def test_what_gguf_has_no_place_for_is_refused(folder, tiny_model, tmp_path):
  out = tmp_path / "a.gguf"
  with pytest.raises(UserError, match="is a 'bert'; GGUF files are written"):
    write_gguf_of(tiny_model, out, kind="gguf-f16")
  with pytest.raises(UserError, match="no format 'f16'; choose gguf-f32"):
    write_gguf_of(tiny_model, out, kind="f16")
  place = tmp_path / "model"
  shutil.copytree(folder("qwen2"), place)
  whole = (place / "config.json").read_text()
  for changes, words in (
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "scaled by 'dynamic'"),
    (
      {"rope_scaling": {**SCALINGS[1], "beta_fast": 16.0}},
      "'yarn' with beta_fast, factor",
    ),
    ({"tie_word_embeddings": False}, "lacks its head"),
    ({"rms_norm_eps": None}, "no usable rms_norm_eps"),
  ):
    fields = {**json.loads(whole), **changes}
    (place / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=words):
      write_gguf_of(place, out, kind="gguf-f16")
  (place / "config.json").write_text(whole)
  tokenizer = json.loads((place / "tokenizer.json").read_text())
  tokenizer["pre_tokenizer"]["add_prefix_space"] = True
  (place / "tokenizer.json").write_text(json.dumps(tokenizer))
  with pytest.raises(UserError, match="for how it cuts words"):
    write_gguf_of(place, out, kind="gguf-f16")
  tensors = {**tensors_of("qwen2"), "model.layers.0.odd.weight": np.zeros(3)}
  save_file(tensors, place / "model.safetensors")
  with pytest.raises(UserError, match="its tensor 'model.layers.0.odd"):
    write_gguf_of(place, out, kind="gguf-f16")
  assert not out.exists()


PROJECTIONS = tuple(f"self_attn.{x}_proj" for x in "qkvo")
UNWRITTEN = [
  # llama.cpp's qwen3 has no biases, nor its qwen2 a tensor of factors
  (
    "qwen3",
    {"attention_bias": True},
    "no place in a 'qwen3' .*attn.*_proj.bias",
  ),
  ("qwen2", {"rope_scaling": SCALINGS[2]}, "no place in a qwen2"),
  ("qwen2", {"head_dim": 32}, "4 heads of 32 in a qwen2 of width 64"),
  (
    "mistral",
    {"layer_types": ["full_attention", "sliding_attention"]},
    r"its slides \(False, True\) would be read as \(True, True\)",
  ),
  (
    "llama",
    {
      "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [2.0] * 8,
        "long_factor": [2.0] * 8,
        "attention_factor": 1.5,
        ORIGINAL: 16,
      }
    },
    "its rotation_scale 1.5 would be read as 1.0",
  ),
  ("llama", {"is_causal": False}, "is_causal is False"),
]


@pytest.mark.parametrize("kind, changes, words", UNWRITTEN)
def test_what_would_be_another_model_is_not_written(
  kind, changes, words, tmp_path
):
  place = random_folder(tmp_path / "model", kind, **changes)
  tensors = load_file(place / "model.safetensors")
  for name, values in list(tensors.items()):
    module = name.removesuffix(".weight")
    if "attention_bias" in changes and module.endswith(PROJECTIONS):
      tensors[f"{module}.bias"] = np.zeros(len(values), np.float32)
  save_file(tensors, place / "model.safetensors")
  with pytest.raises(UserError, match=words):
    write_gguf_of(place, tmp_path / "a.gguf", kind="gguf-f16")
  assert not (tmp_path / "a.gguf").exists()


def test_mistral_s_window_is_written_with_a_warning(tmp_path, caplog):
  place = random_folder(tmp_path / "model", "mistral")
  fields = read_fields(place)
  for name, window, room, warned in (
    ("a.gguf", 3, 32, True),
    ("b.gguf", 32, 32, False),
    ("c.gguf", None, 32, False),
    ("d.gguf", 4096, 8192, True),  # Mistral's own, where the field isn't there
  ):
    changes = {"max_position_embeddings": room, "sliding_window": window}
    if room > 32:
      del changes["sliding_window"], fields["sliding_window"]
    (place / "config.json").write_text(json.dumps({**fields, **changes}))
    caplog.clear()
    write_gguf_of(place, tmp_path / name, kind="gguf-f16")
    gguf = read_gguf(tmp_path / name)
    found = gguf.metadata.get("llama.attention.sliding_window")
    assert found == window
    assert warned == (f"not the last {window}" in caplog.text)
    assert config_fields(gguf).get("sliding_window") == window


def test_a_head_of_its_own_is_written_whatever_the_config_says(tmp_path):
  """As transformers has it: a config ties only what is one."""
  place = random_folder(tmp_path / "model", "llama")
  tensors = load_file(place / "model.safetensors")
  words = tensors["model.embed_tokens.weight"]
  for name, head in (("same.gguf", words), ("other.gguf", words[::-1])):
    head = np.ascontiguousarray(head)
    save_file({**tensors, "lm_head.weight": head}, place / "model.safetensors")
    write_gguf_of(place, tmp_path / name, kind="gguf-f16")
    gguf = open_tensors(tmp_path / name)
    assert gguf.fields["tie_word_embeddings"] == (head is words)
    if head is not words:
      assert np.array_equal(gguf.get_tensor("lm_head.weight"), head)


@pytest.mark.slow
def test_the_command_merges_an_adapter_on_a_gguf_base(
  file, random_adapter, home, tmp_path
):
  base = resolve(file("llama"))
  adapter = random_adapter(
    base=base, kind="language_modelling", targets=["q_proj", "v_proj"]
  )
  out = tmp_path / "deep" / "merged.gguf"
  done = run(
    "merge", f"--adapter={adapter}", f"--out={out}", "--format=gguf-f16"
  )
  assert done.returncode == 0, done.stderr
  assert "5 in F32, 15 in F16" in done.stdout.replace("\n", " ")
  assert [x.name for x in out.parent.iterdir()] == [out.name]
  about = read_gguf(out).metadata
  assert (about["general.file_type"], about["general.name"]) == (1, "merged")
  expected = merged_params(restore_adapter(load_adapter(adapter)))
  found, plain = (
    flatten_dict(load_classifier(place).params)
    for place in (resolve(out), base)
  )
  moved = set()
  for path, leaf in flatten_dict(expected).items():
    half = np.asarray(leaf).astype(np.float16).astype(np.float32)
    assert np.array_equal(found[path], half), path
    if not np.array_equal(found[path], plain[path]):
      moved.add(path[-2:])
  assert moved == {("q_proj", "kernel"), ("v_proj", "kernel")}


def test_four_bits_are_refused_with_the_reason(folder, tmp_path):
  out = tmp_path / "a.gguf"
  with pytest.raises(UserError, match="would undo most of what was learned"):
    write_gguf_of(folder("llama"), out, kind="gguf-q4_k_m")
  assert not out.exists()
