"""A tokenizer that leads elsewhere, or makes too much of a text, is refused."""

import base64
import json
import struct

import pytest

from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.models.tokenizer_files import check_tokenizer

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
CHARSMAP = struct.pack("<I", 4) + b"trie" + b"x" * 100 + b"\0y\0"
A, B = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
PLAIN = {  # as files have it
  "normalizer": {
    "type": "Sequence",
    "normalizers": [
      {"type": "Prepend", "prepend": "▁"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
      {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
      {"type": "NFKD"},
      {"type": "Lowercase"},
    ],
  },
  "pre_tokenizer": {"type": "Metaspace", "replacement": "▁"},
  "post_processor": {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, A],
    "pair": [A, B],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
  },
  "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]},
  "padding": {"strategy": {"Fixed": 128}},
}


def write(folder, **fields):
  (folder / "tokenizer.json").write_text(json.dumps({**PLAIN, **fields}))


def in_sequence(name, *steps):
  return {"type": "Sequence", name: list(steps)}


def test_what_files_have_is_read(tmp_path):
  write(tmp_path)
  check_tokenizer(tmp_path)
  write(tmp_path, padding={"strategy": "BatchLongest"}, normalizer=None)
  check_tokenizer(tmp_path)


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"normalizer": in_sequence("normalizers", *[DOUBLE] * 40)}, "64 times"),
    (
      {"pre_tokenizer": in_sequence("pretokenizers", *[DOUBLE] * 40)},
      "its pre_tokenizer",
    ),
    ({"decoder": in_sequence("decoders", *[DOUBLE] * 40)}, "its decoder"),
    ({"normalizer": {**DOUBLE, "content": "a" * 100}}, "64 times"),
    ({"normalizer": {**DOUBLE, "pattern": {"String": ""}}}, "what is empty"),
    (
      {
        "normalizer": {
          **DOUBLE,
          "pattern": {"Regex": "b*"},
          "content": "a" * 99,
        }
      },
      "64 times",
    ),
    (
      {"normalizer": in_sequence("normalizers", *[{"type": "ByteLevel"}] * 40)},
      "64 times",
    ),
    (
      {
        "normalizer": {
          "type": "Precompiled",
          "precompiled_charsmap": base64.b64encode(CHARSMAP).decode(),
        }
      },
      "64 times",
    ),
    (
      {"post_processor": {**PLAIN["post_processor"], "single": [A] * 50}},
      "repeat the text",
    ),
    (
      {
        "post_processor": {
          **PLAIN["post_processor"],
          "special_tokens": {"<s>": {"ids": [0] * 2000}},
        }
      },
      "would put 2,000 tokens",
    ),
    ({"padding": {"strategy": {"Fixed": 10**9}}}, "1,000,000,000 tokens"),
    ({"model": {"vocab": {"a": 2**31}}}, "'a' has the number 2,147,483,648"),
    ({"added_tokens": [{"id": 10**9, "content": "b"}]}, "'b' has the number"),
    ({"normalizer": 3}, "is no tokenizer's"),
    ({"normalizer": {"type": "Replace"}}, "is no tokenizer's: KeyError"),
  ],
)
def test_what_makes_too_much_of_a_text(fields, words, tmp_path):
  write(tmp_path, **fields)
  with pytest.raises(UserError, match=words):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  "name",
  ["vocab.txt", "tokenizer.json", "special_tokens_map.json", "config.json"],
)
def test_files_that_lead_elsewhere(name, tmp_path):
  folder, private = tmp_path / "model", tmp_path / "private"
  folder.mkdir()
  private.write_text("[UNK]\n[PAD]\nsecret\n")
  (folder / "vocab.txt").write_text("[UNK]\n[PAD]\n")
  for place, words in ((private, "outside of"), ("/dev/zero", "outside of")):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(place)
    with pytest.raises(UserError, match=words):
      load_tokenizer(folder)


@pytest.mark.parametrize(
  "fields",
  [{"merges_file": "{}"}, {"fast_tokenizer_files": ["../private.json"]}],
)
def test_a_config_that_names_files_elsewhere(fields, tmp_path):
  folder, private = tmp_path / "model", tmp_path / "private.json"
  folder.mkdir()
  private.write_text("{}")
  text = json.dumps(fields).replace("{}", str(private))
  (folder / "tokenizer_config.json").write_text(text)
  (folder / "vocab.txt").write_text("[UNK]\n")
  with pytest.raises(UserError, match="outside of"):
    load_tokenizer(folder)
  # those of the machine that it was made on are nowhere
  private.unlink()
  check_tokenizer(folder)


def test_a_vocabulary_with_a_number_beyond_all_others(tmp_path):
  (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a": 1000000000}')
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  with pytest.raises(UserError, match="vocab.json is not used: its token 'a'"):
    load_tokenizer(tmp_path)


def test_a_vocabulary_without_a_token_for_unknown_words(tmp_path):
  (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\na\n")
  with pytest.raises(UserError, match=r"Missing \[UNK\] token"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("end, word", [(0, "[PAD]"), (2**63, None), (-1, None)])
def test_a_config_may_name_the_end(end, word, tmp_path):
  (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
  config = {"model_type": "bert", "eos_token_id": end}
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert load_tokenizer(tmp_path).eos_token == word
