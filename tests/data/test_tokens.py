import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import BertProcessing
from transformers import PreTrainedTokenizerFast

from vera_jax.data import tokens as tokens_module
from vera_jax.data.examples import Examples
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.data.tokens import FolderTokenizer, tokenise
from vera_jax.errors import UserError
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.glue_facts import TASKS


@pytest.fixture
def pairs() -> Examples:
  return Examples(
    first=["a b c d e f", "a"],
    second=["x y", "z"],
    labels=np.array([1, 0], np.int32),
    index=np.array([0, 1]),
  )


def example(tokens, i):
  part = slice(tokens.offsets[i], tokens.offsets[i + 1])
  return tokens.ids[part].tolist(), tokens.token_types[part].tolist()


def test_pairs_are_framed_typed_and_cut_at_the_longer(pairs, tiny_tokenizer):
  tokens = tokenise(pairs, tiny_tokenizer, 8, None)
  # [CLS] a b c [SEP] x y [SEP], and [CLS] a [SEP] z [SEP]
  assert example(tokens, 0) == (
    [2, 4, 5, 6, 3, 27, 28, 3],
    [0, 0, 0, 0, 0, 1, 1, 1],
  )
  assert example(tokens, 1) == ([2, 4, 3, 29, 3], [0, 0, 0, 1, 1])
  assert (tokens.truncated, tokens.pad_id, len(tokens)) == (1, 0, 2)
  assert tokens.lengths.tolist() == [8, 5]
  np.testing.assert_array_equal(tokens.labels, pairs.labels)


def test_single_sentences_without_labels(tiny_tokenizer):
  texts = Examples(["a b", "c"], None, None, np.arange(2))
  tokens = tokenise(texts, tiny_tokenizer, 8, None)
  assert example(tokens, 0)[0] == [2, 4, 5, 3] and tokens.labels is None


def test_choices_are_texts_of_one_example(pairs, tiny_tokenizer, tmp_path):
  one = dataclasses.replace(pairs, choices=2, labels=None, index=np.arange(1))
  for cache in (None, tmp_path, tmp_path):  # not, newly and already cached
    tokens = tokenise(one, tiny_tokenizer, 8, cache)
    assert len(tokens) == 1 and tokens.choices == 2
    assert tokens.text_lengths.tolist() == [8, 5]
    assert tokens.lengths.tolist() == [13]


def same(one, other):
  for field in dataclasses.fields(one):
    a, b = getattr(one, field.name), getattr(other, field.name)
    np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("length", [1, 4])
def test_a_length_below_the_special_tokens_is_refused(
  pairs, tiny_tokenizer, length
):
  """The tokenizer itself would cut nothing, or leave nothing of the texts."""
  words = f"max_length is {length}, but 3 tokens .* at least 5"
  with pytest.raises(UserError, match=words):
    tokenise(pairs, tiny_tokenizer, length, None)
  assert len(tokenise(pairs, tiny_tokenizer, 5, None)) == 2


def test_the_cache_gives_the_same_tokens(
  pairs, tiny_tokenizer, tmp_path, monkeypatch
):
  cache = tmp_path / "made" / "here"
  first = tokenise(pairs, tiny_tokenizer, 8, cache)
  assert [p.name for p in cache.iterdir()] == [f"{first.fingerprint}.tokens"]
  tiny_tokenizer.backend_tokenizer.no_truncation()  # state of a call: no key
  monkeypatch.setattr(tokens_module, "_encode", None)
  same(first, tokenise(pairs, tiny_tokenizer, 8, cache))


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "byte"])
def test_a_damaged_cache_is_made_again(pairs, tiny_tokenizer, tmp_path, damage):
  good = tokenise(pairs, tiny_tokenizer, 8, tmp_path)
  (path,) = tmp_path.iterdir()
  stored = path.read_bytes()
  harmed = {
    "cut": stored[: len(stored) // 2],
    "noise": b"x" * 999,
    "empty": b"",
    "byte": stored[:-1] + bytes([stored[-1] ^ 1]),
  }
  path.write_bytes(harmed[damage])
  same(good, tokenise(pairs, tiny_tokenizer, 8, tmp_path))
  (path,) = tmp_path.iterdir()
  assert path.read_bytes() == stored


def test_the_fingerprint_covers_all_that_matters(pairs, tiny_tokenizer):
  def change(**fields):
    return dataclasses.replace(pairs, **fields)

  variants = [
    (pairs, 8),
    (pairs, 9),
    (change(first=["a b c d e f", "b"]), 8),
    (change(second=["x y", "a"]), 8),
    (change(second=None), 8),
    (change(labels=np.array([1, 1], np.int32)), 8),
    (change(labels=None), 8),
    (change(first=["a b c d e", "fa"]), 8),
    (change(choices=2, labels=np.array([1], np.int32)), 8),
  ]
  prints = [
    tokenise(examples, tiny_tokenizer, length, None).fingerprint
    for examples, length in variants
  ]
  tiny_tokenizer.add_tokens(["new"])
  prints.append(tokenise(pairs, tiny_tokenizer, 8, None).fingerprint)
  assert len(set(prints)) == len(prints)


def test_an_unwritable_cache_only_warns(
  pairs, tiny_tokenizer, tmp_path, caplog
):
  (tmp_path / "file").write_text("in the way")
  tokens = tokenise(pairs, tiny_tokenizer, 8, tmp_path / "file")
  assert len(tokens) == 2 and "isn't cached" in caplog.text


def test_with_cached_tokens_no_tokenizer_is_loaded(
  pairs, tiny_tokenizer, tmp_path, monkeypatch
):
  folder, cache = tmp_path / "model", tmp_path / "cache"
  tiny_tokenizer.save_pretrained(folder)
  first = tokenise(pairs, FolderTokenizer(folder, cache), 8, cache)
  for tokenizer in (tiny_tokenizer, load_tokenizer(folder)):
    same(first, tokenise(pairs, tokenizer, 8, None))
  with monkeypatch.context() as patch:
    patch.setattr(tokens_module, "load_tokenizer", None)
    same(first, tokenise(pairs, FolderTokenizer(folder, cache), 8, cache))
  for path in cache.glob("*.json"):
    path.write_text("{half")  # damaged: made again
  same(first, tokenise(pairs, FolderTokenizer(folder, cache), 8, cache))
  tiny_tokenizer.add_tokens(["new"])  # another tokenizer in its place
  tiny_tokenizer.save_pretrained(folder)
  other = tokenise(pairs, FolderTokenizer(folder, cache), 8, cache)
  assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize(
  "name, message",
  [
    ("config.json", "holds no tokenizer: tokenizer.json"),
    ("tokenizer.json", "tokenizer.json can't be read"),
  ],
)
def test_a_missing_and_a_broken_tokenizer(tmp_path, name, message):
  (tmp_path / name).write_text("{half")
  with pytest.raises(UserError, match=message):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("config", [None, '{"model_type": "roberta"}'])
def test_roberta_from_vocabulary_and_merges(tmp_path, config):
  """The byte alphabet and two merges; RoBERTa has no token types."""
  words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
  words += sorted(ByteLevel.alphabet()) + ["th", "the"]
  vocab = {word: id for id, word in enumerate(words)}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
  if config:
    (tmp_path / "config.json").write_text(config)
  texts = Examples(["the"], ["t"], None, np.arange(1))
  tokens = tokenise(texts, load_tokenizer(tmp_path), 16, None)
  expected = [0, vocab["the"], 2, 2, vocab["t"], 2]
  assert example(tokens, 0) == (expected, [0] * 6)
  assert (tokens.pad_id, tokens.truncated) == (1, 0)


def test_minilm_ignores_the_padding_its_file_asks_for(
  minilm_folder, glue_folder
):
  # its tokenizer.json pads all texts to 128 and cuts them there
  dev = load_split(TASKS["rte"], glue_folder, "validation")
  tokenizer = load_tokenizer(minilm_folder)
  tokens = tokenise(dev, tokenizer, 512, None)
  assert tokens.truncated == 0 and tokens.lengths.max() > 128
  assert (tokens.ids != tokens.pad_id).all()
  cut = tokenise(dev, tokenizer, 128, None)
  assert cut.truncated == (tokens.lengths > 128).sum() > 0


WORDS = Examples(
  [["abc", "b", "ab", "c"], ["c", "New York"]],
  None,
  [np.array([3, 1, 2, 1], np.int32), np.array([2, 1], np.int32)],
  np.arange(2),
)


def word_pieces():
  """abc is a ##b ##c; New York, as one word, is two unknown tokens."""
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  vocab = {p: i for i, p in enumerate([*special, "a", "b", "c", "##b", "##c"])}
  backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  backend.pre_tokenizer = WhitespaceSplit()
  ends = (("[SEP]", 3), ("[CLS]", 2))
  backend.post_processor = BertProcessing(*ends)
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
  )


def test_the_first_part_of_a_word_has_its_number_and_label(tmp_path):
  tokenizer = word_pieces()
  tokens = tokenise(WORDS, tokenizer, 8, tmp_path)
  # [CLS] a ##b ##c b a ##b [SEP], c is cut; [CLS] c New York [SEP]
  assert tokens.lengths.tolist() == [8, 5] and tokens.truncated == 1
  first, second = [-1, 0, -1, -1, 1, 2, -1, -1], [-1, 0, 1, -1, -1]
  assert tokens.words.tolist() == first + second
  assert tokens.labels.tolist() == [0, 3, 0, 0, 1, 2, 0, 0] + [0, 2, 1, 0, 0]
  same(tokenise(WORDS, tokenizer, 8, tmp_path), tokens)  # from the cache
  joined = dataclasses.replace(WORDS, first=["abc b ab c", "c New York"])
  joined = dataclasses.replace(joined, labels=None)
  other = tokenise(joined, tokenizer, 8, tmp_path)
  assert other.words is None and other.fingerprint != tokens.fingerprint
  np.testing.assert_array_equal(other.ids, tokens.ids)


def test_a_space_may_belong_to_the_token_behind_it():
  """As byte-level tokenizers have it that don't trim their offsets."""
  offsets = [(0, 0), (0, 2), (2, 4), (4, 6), (6, 7), (0, 0)]
  words = tokens_module._beginnings(["ab", "c", "def"], offsets)
  assert list(words) == [-1, 0, 1, 2, -1, -1]
