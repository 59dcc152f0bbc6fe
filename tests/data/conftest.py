"""A tiny tokenizer, and random tokens."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vera_jax.data.tokens import Tokens


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
  """Words a to z as ids 4 to 29, in BERT's frame of special tokens."""
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  words = special + [chr(ord("a") + i) for i in range(26)]
  vocab = {word: id for id, word in enumerate(words)}
  backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.post_processor = processors.BertProcessing(
    ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token="[PAD]",
    unk_token="[UNK]",
    cls_token="[CLS]",
    sep_token="[SEP]",
    model_input_names=["input_ids", "token_type_ids", "attention_mask"],
  )


def random_tokens(
  seed: int, *, examples: int, longest: int, regression: bool = False
) -> Tokens:
  """Ragged random ids whose first id in each example is 2."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, longest + 1, examples)
  lengths[0] = longest
  ids = rng.integers(4, 100, lengths.sum()).astype(np.int32)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  ids[offsets[:-1]] = 2
  labels = rng.integers(0, 3, examples).astype(np.int32)
  return Tokens(
    ids=ids,
    offsets=offsets,
    token_types=rng.integers(0, 2, lengths.sum()).astype(np.int32),
    labels=labels.astype(np.float32) / 3 if regression else labels,
    index=np.arange(examples),
    truncated=0,
    pad_id=1,
    fingerprint="",
  )


@pytest.fixture
def make_tokens():
  return random_tokens
