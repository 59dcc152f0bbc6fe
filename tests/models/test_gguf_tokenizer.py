"""What a GGUF header leaves open about ids, and what it has no place for."""

import json
import time

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.models.gguf_folders import ROWS, byte_level
from vera_jax.errors import UserError
from vera_jax.models.gguf_tokenizer import (
  LONGEST,
  RULES,
  SPACE,
  _cut,
  merges_of,
  tokenizer_files,
  tokenizer_metadata,
)

PREPEND = {"type": "Prepend", "prepend": SPACE}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SCORED = {
  "tokenizer.ggml.model": "llama",
  "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", SPACE, "t", f"{SPACE}t"],
  "tokenizer.ggml.scores": -np.arange(6, dtype=np.float32),
  "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1], np.int32),
}


def sequence(*steps):
  return {"type": "Sequence", "normalizers": list(steps)}


@pytest.fixture
def words(tmp_path):
  """A folder whose tokenizer cuts as GPT-2's."""
  byte_level(tmp_path, "words")
  (tmp_path / "config.json").write_text("{}")
  return tmp_path


@pytest.fixture
def scored(tmp_path):
  """A folder with a vocabulary of SentencePiece's kind."""
  for name, value in tokenizer_files(SCORED, source="a.gguf").items():
    (tmp_path / name).write_text(json.dumps(value))
  (tmp_path / "config.json").write_text("{}")
  return tmp_path


def changed(folder, **changes):
  """Writes other values into tokenizer.json; dotted names lead inside."""
  file = folder / "tokenizer.json"
  made = json.loads(file.read_text())
  for name, value in changes.items():
    *path, last = name.split("__")
    inner = made
    for word in path:
      inner = inner[int(word) if word.isdigit() else word]
    inner[last] = value
  file.write_text(json.dumps(made))
  return folder


def encode(metadata, text):
  made = tokenizer_files(metadata, source="a.gguf")["tokenizer.json"]
  return Tokenizer.from_str(json.dumps(made)).encode(text)


@pytest.mark.parametrize(
  "normalizer, kinds",
  [
    ({"type": "NFKC"}, "NFKC"),
    ({"type": "Lowercase"}, "Lowercase"),
    (sequence({"type": "NFC"}, {"type": "Lowercase"}), "NFC, Lowercase"),
    (sequence(SPACES), "Replace"),
  ],
)
def test_normalizers_of_byte_level_bpe_are_not_lost(normalizer, kinds, words):
  changed(words, normalizer=normalizer)
  with pytest.raises(UserError, match=rf"changes texts first \({kinds}\)"):
    tokenizer_metadata(words, rows=ROWS)


@pytest.mark.parametrize("steps", [[], [{"type": "NFC"}]])
def test_nfc_is_written_with_a_warning(steps, words, caplog):
  changed(words, normalizer=sequence(*steps))
  assert tokenizer_metadata(words, rows=ROWS)["tokenizer.ggml.pre"] == "gpt-2"
  assert ("not in NFC get other ids" in caplog.text) == bool(steps)


def space(scheme, split=False):
  return {
    "type": "Metaspace",
    "replacement": SPACE,
    "prepend_scheme": scheme,
    "split": split,
  }


@pytest.mark.parametrize(
  "changes, prefix, warned",
  [
    ({}, True, False),
    ({"normalizer": SPACES}, False, False),
    ({"normalizer": None, "pre_tokenizer": space("never")}, False, False),
    ({"normalizer": None, "pre_tokenizer": space("first")}, True, True),
    ({"normalizer": None, "pre_tokenizer": space("never", True)}, None, False),
    ({"pre_tokenizer": space("never")}, None, False),
    ({"normalizer": sequence(SPACES, {"type": "NFKC"})}, None, False),
    ({"normalizer": None}, None, False),
  ],
)
def test_spaces_of_scored_vocabularies(changes, prefix, warned, scored, caplog):
  changed(scored, **changes)
  if prefix is None:
    with pytest.raises(UserError, match="for how its tokenizer changes texts"):
      tokenizer_metadata(scored, rows=6)
  else:
    about = tokenizer_metadata(scored, rows=6)
    assert about["tokenizer.ggml.add_space_prefix"] == prefix
    assert about["tokenizer.ggml.tokens"] == SCORED["tokenizer.ggml.tokens"]
  assert ("other ids where a text begins" in caplog.text) == warned


OTHERS = [
  ({"model__dropout": 0.1}, "has a dropout"),
  ({"model__end_of_word_suffix": "</w>"}, "has a end_of_word_suffix"),
  ({"added_tokens__0__lstrip": True}, "its token '<end>' is lstrip"),
  ({"added_tokens__1__single_word": True}, "'<note>' is single_word"),
]


@pytest.mark.parametrize("changes, message", OTHERS)
def test_other_parts_are_not_lost(changes, message, words):
  with pytest.raises(UserError, match=message):
    tokenizer_metadata(changed(words, **changes), rows=ROWS)


def test_what_is_written_is_read_as_the_same_tokenizer(words):
  """Whatever the reason: here an id's padding has the name of a token."""
  made = json.loads((words / "tokenizer.json").read_text())
  odd = {**made["added_tokens"][1], "content": "[PAD47]"}
  changed(words, added_tokens=[made["added_tokens"][0], odd])
  with pytest.raises(UserError, match="not be read again .*are there twice"):
    tokenizer_metadata(words, rows=ROWS)
  # a padding of texts is none of ids
  padding = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_id": 0}
  padding |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "a"}
  changed(words, added_tokens=made["added_tokens"], padding=padding)
  assert not tokenizer_metadata(words, rows=ROWS)[
    "tokenizer.ggml.add_bos_token"
  ]


def test_a_token_that_is_looked_for_in_changed_texts(scored):
  changed(scored, added_tokens__1__normalized=True)
  with pytest.raises(UserError, match="its token '<s>' is normalized"):
    tokenizer_metadata(scored, rows=6)


def test_tokens_around_a_text_are_those_with_a_name(words):
  from tokenizers import processors

  for single, known in (
    ("$A <end>", True),
    ("<note> $A", False),
    ("$A <end> <end>", False),
    ("<end> $A", False),  # which is no begin
  ):
    made = Tokenizer.from_file(str(words / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(
      single=single,
      special_tokens=[(x, made.token_to_id(x)) for x in ("<end>", "<note>")],
    )
    made.save(str(words / "tokenizer.json"))
    if known:
      about = tokenizer_metadata(words, rows=ROWS)
      assert about["tokenizer.ggml.add_eos_token"]
      assert not about["tokenizer.ggml.add_bos_token"]
    else:
      with pytest.raises(UserError, match="begin or end with several tokens"):
        tokenizer_metadata(words, rows=ROWS)


def test_whole_words_before_merges_go_with_the_rule(tmp_path):
  """Where every token is reached by merges, it makes no difference."""
  (tmp_path / "config.json").write_text("{}")
  for rule in (list(RULES)[0], list(RULES)[3]):
    byte_level(tmp_path, rule)
    implied = "llama-bpe" in RULES[rule]
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = made["model"]["merges"]
    for whole in (True, False):
      changed(tmp_path, model__ignore_merges=whole, model__merges=merges)
      tokenizer_metadata(tmp_path, rows=ROWS)
      changed(tmp_path, model__merges=merges[:-1])
      if whole == implied:
        tokenizer_metadata(tmp_path, rows=ROWS)
      else:
        with pytest.raises(UserError, match=f"has ignore_merges {whole}"):
          tokenizer_metadata(tmp_path, rows=ROWS)


@pytest.mark.parametrize("rule", [None, "default"])
def test_without_a_rule_words_are_cut_as_llama_cpp_does(rule, words, caplog):
  about = tokenizer_metadata(words, rows=ROWS)
  about["tokenizer.ggml.pre"] = rule
  about = {key: x for key, x in about.items() if x is not None}
  source = f"{rule}.gguf"
  made = tokenizer_files(about, source=source)["tokenizer.json"]
  (message,) = caplog.messages
  assert f"{source} doesn't say by which rule" in message
  cut = Tokenizer.from_str(json.dumps(made)).pre_tokenizer
  # signs are cut out first, then words, numbers, and threes of digits
  for text, expected in (
    ("don't($5)", ["don", "'", "t", "($", "5", ")"]),
    ("a 12345,6", ["a", "Ġ", "123", "45", ",", "6"]),
    ("  ½ x", ["Ġ", "Ġ", "Â½", "Ġx"]),
  ):
    assert [piece for piece, _ in cut.pre_tokenize_str(text)] == expected
  assert made["pre_tokenizer"] == json.loads(_json(_cut("signs")))


def _json(cut):
  from tokenizers import models

  made = Tokenizer(models.BPE())
  made.pre_tokenizer = cut
  return json.dumps(json.loads(made.to_str())["pre_tokenizer"])


def test_scored_vocabularies_have_standard_ids(tmp_path):
  """As llama.cpp has them, where a header names none."""
  assert encode(SCORED, "t").tokens == ["<s>", f"{SPACE}t"]
  assert encode(SCORED, "t<unk>t</s>").ids == [1, 5, 0, 5, 2]
  files = tokenizer_files(SCORED, source="a.gguf")
  config = files["tokenizer_config.json"]
  assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_what_ids_need_is_there(words):
  about = tokenizer_metadata(words, rows=ROWS)
  key = "tokenizer.ggml."
  for changes, message in (
    ({"add_bos_token": True}, "begin or end with a token that it doesn't name"),
    ({"pre": "llama-bpe", "add_bos_token": None}, "doesn't name"),
    ({"merges": None}, "has no merges"),
    ({"add_space_prefix": True}, "begin with a space, which llama.cpp"),
    ({"bos_token_id": -1}, "are beyond its 48 tokens"),
  ):
    odd = about | {key + name: value for name, value in changes.items()}
    odd = {name: value for name, value in odd.items() if value is not None}
    with pytest.raises(UserError, match=message):
      tokenizer_files(odd, source="a.gguf")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_token_of_two_megabytes_is_refused_at_once(kind):
  tokens = ["<unk>", "<s>", "</s>", "a", "b", "a" * 2_000_000]
  about = SCORED | {
    "tokenizer.ggml.model": kind,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.merges": [],
  }
  start = time.monotonic()
  with pytest.raises(UserError, match=f"more than {LONGEST} letters"):
    tokenizer_files(about, source="a.gguf")
  assert time.monotonic() - start < 5


@pytest.mark.parametrize(
  "kind, words",
  [(1, "made of one another in"), (3, "special tokens have more")],
)
def test_tokens_that_come_to_much_together_are_refused(kind, words):
  """Four megabytes of them would be two million merges, or take minutes."""
  tokens = ["<unk>", "<s>", "</s>", *("a" * n for n in range(1, 4097, 2))]
  tokens += ["a" * n for n in range(2, 200, 2)]
  count = len(tokens) - 3
  about = SCORED | {
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
    "tokenizer.ggml.token_type": np.array([2, 3, 3] + [kind] * count, np.int32),
  }
  start = time.monotonic()
  with pytest.raises(UserError, match=words):
    tokenizer_files(about, source="a.gguf")
  assert time.monotonic() - start < 10


def test_merges_are_all_cuts_into_two_tokens():
  tokens = ["a", "aa", "aaa", "ab", "b", "a" * LONGEST]
  merges = merges_of(tokens, -np.arange(6), np.ones(6))
  assert merges == [("a", "a"), ("a", "aa"), ("aa", "a"), ("a", "b")]
