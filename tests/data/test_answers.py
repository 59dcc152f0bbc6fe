"""Answers as tokens: what is learned of them, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AddedToken, PreTrainedTokenizerFast

from tests.data.test_completions import with_begin
from tests.tasks.decoder_files import tokenizer_of_words
from vera_jax.data.answers import Answers, encode_answers
from vera_jax.data.examples import Examples
from vera_jax.data.tokens import tokenise
from vera_jax.errors import UserError

CHAT, PLAIN = Answers("chat"), Answers("plain")
TEMPLATE = (
  "{% for m in messages %}{{ m.role }} {{ m.content }} <end>\n word9 "
  "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
TAGGED = (
  "{% for m in messages %}{% if m.role == 'user' %}{{m.content}} <end> "
  "{% else %}{% generation %}{{m.content}} <end> {% endgeneration %}"
  "{% endif %}{% endfor %}"
)
MOVED = "<end> {% endgeneration %}", "{% endgeneration %}<end> "
HEADER = "{% for m in messages %}{{m.role}} {{m.content}} <end> {% endfor %}"
NO_END = HEADER.replace("<end> ", "")
WHOLE = "{% generation %}{% for m in messages %}{{ m.content }} {% endfor %}"
END, UNKNOWN, W9 = 0, 2, 12


def chat_tokenizer(template=TEMPLATE):
  tokenizer = tokenizer_of_words(unk_token="<unknown>", pad_token="<end>")
  tokenizer.chat_template = template
  return tokenizer


def examples_of(first, second):
  """Numbered from 40, on the lines from 1 of a file."""
  places = [f"a.jsonl:{i + 1}" for i in range(len(first))]
  index = np.arange(len(first)) + 40
  return Examples(first, second, None, index, places=places)


def conversations(*texts):
  """Each with a question and its answer in turn."""
  roles = ("user", "assistant")
  rows = [
    json.dumps(
      [
        {"role": roles[i % 2], "content": content}
        for i, content in enumerate(text)
      ]
    )
    for text in texts
  ]
  return examples_of(rows, None)


def pairs(*rows):
  first, second = (list(side) for side in zip(*rows, strict=True))
  return examples_of(first, second)


def learned(examples, tokenizer, how, max_length=99):
  """Each example's ids, and those of them that are learned."""
  found = encode_answers(examples, tokenizer, max_length, how)
  bounds = zip(found["offsets"][:-1], found["offsets"][1:], strict=True)
  return [
    (found["ids"][a:b].tolist(), found["ids"][a:b][found["learned"][a:b]])
    for a, b in bounds
  ]


def test_every_answer_is_learned_up_to_its_end():
  four = ("word1", "word2 word3", "word4", "word5")
  [(ids, own)] = learned(conversations(four), chat_tokenizer(), CHAT)
  turns = ([4], [5, 6], [7], [8])
  assert ids == [i for turn in turns for i in (UNKNOWN, *turn, END, W9)]
  # the word behind an end is none of the answer; a blank one would be left out
  assert own.tolist() == [5, 6, END, W9, 8, END, W9]
  blank = chat_tokenizer(TEMPLATE.replace("word9 ", ""))
  [(_, own)] = learned(conversations(four), blank, CHAT)
  assert own.tolist() == [5, 6, END, 8, END]


def test_tags_are_read_as_transformers_reads_them():
  four = ("word1", "word2 word3", "word4", "word5")
  template = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} word9 "
    "{% else %}{% generation %}{{ m.content }} <end>{% endgeneration %} word8 "
    "{% endif %}{% endfor %}"
  )
  rows, tokenizer = conversations(four), chat_tokenizer(template)
  want = tokenizer.apply_chat_template(
    json.loads(rows.first[0]),
    return_dict=True,
    return_assistant_tokens_mask=True,
  )
  found = encode_answers(rows, tokenizer, 99, CHAT)
  # all but the last word, which is behind the last answer
  assert found["ids"].tolist() == want["input_ids"][:-1]
  assert found["learned"].tolist() == want["assistant_masks"][:-1]
  assert sum(want["assistant_masks"]) == 5


def test_a_special_tokens_name_in_a_text_is_counted():
  rows = conversations(("word1", "word2 <end> word3"), ("word1", "word2"))
  tokens = tokenise(rows, chat_tokenizer(), 99, None, completions=CHAT)
  assert tokens.counts["special"] == 1


@pytest.mark.parametrize(
  "template, without_end, with_header",
  [
    (TEMPLATE.replace("word9 ", ""), 0, 0),
    # the end stands behind the tags
    (TAGGED.replace(*MOVED), 2, 0),
    (TAGGED, 0, 0),
    # nothing ends an answer, and nothing is asked with
    (NO_END, 2, 2),
    (HEADER, 0, 2),
  ],
)
def test_templates_that_end_no_answer_or_teach_a_header_are_counted(
  template, without_end, with_header
):
  rows = conversations(
    ("word1", "word2"), ("word1", "word2", "word3", "word4 word5")
  )
  tokens = tokenise(rows, chat_tokenizer(template), 99, None, completions=CHAT)
  found = tokens.counts["without_end"], tokens.counts["with_header"]
  assert found == (without_end, with_header)


def test_prompts_and_answers_are_one_text():
  rows = pairs(("word1 ", "word2"), ("word3", " word4 word5"))
  found = learned(rows, with_begin(), PLAIN)
  assert [(ids, own.tolist()) for ids, own in found] == [
    ([1, 4, 5, END], [5, END]),
    ([1, 6, 7, 8, END], [7, 8, END]),
  ]


def test_an_answer_behind_the_cut_leaves_its_row_out():
  rows = conversations(("word1", "word2"), ("word1 " * 9, "word2"))
  tokenizer = chat_tokenizer()
  tokens = tokenise(rows, tokenizer, 10, None, completions=CHAT)
  assert tokens.left_out == (41,) and tokens.index.tolist() == [40]
  assert tokens.truncated == 1 and len(tokens) == 1
  assert tokens.learned.shape == tokens.ids.shape == (8,)
  # a part of an answer stays
  rows = conversations(("word1", "word2 " * 9))
  tokens = tokenise(rows, tokenizer, 7, None, completions=CHAT)
  assert (tokens.truncated, tokens.reads.tolist()) == (1, [2])
  with pytest.raises(
    UserError, match="(?s)within 4 tokens.*mask is all 0.*word1"
  ):
    tokenise(rows, tokenizer, 4, None, completions=CHAT)
  with pytest.raises(UserError, match="max_length is 1; at least 2"):
    tokenise(rows, tokenizer, 1, None, completions=CHAT)


@pytest.mark.parametrize(
  "template, message",
  [
    ("{% generation %}{% endgeneration %}word7", "nothing.*all 0.*word7"),
    (WHOLE + "{% endgeneration %}", "all of it.*all 1.*word1 word2"),
    ("{{ raise_exception('no') }}", "The chat template of .* used: no$"),
  ],
)
def test_a_row_that_teaches_nothing_is_named_and_shown(template, message):
  rows = conversations(("word1", "word2"))
  with pytest.raises(UserError, match=f"(?s)^a.jsonl:1: {message}"):
    learned(rows, chat_tokenizer(template), CHAT)


def test_an_answer_without_a_prompt_is_refused():
  with pytest.raises(UserError, match="^a.jsonl:1: all of it would be learned"):
    learned(pairs(("", "word1 word2")), with_begin(), PLAIN)


def test_another_template_makes_other_tokens(tmp_path):
  rows = conversations(("word1", "word2"))
  one, again, other = (
    tokenise(rows, chat_tokenizer(t), 99, tmp_path, completions=CHAT)
    for t in (TEMPLATE, TEMPLATE, f"word8 {TEMPLATE}")
  )
  assert one.fingerprint == again.fingerprint != other.fingerprint
  np.testing.assert_array_equal(one.learned, again.learned)
  assert len(other.ids) == len(one.ids) + 1


def test_answers_that_change_their_prompts_tokens_are_counted():
  vocabulary = {x: i for i, x in enumerate(["<end>", "ask:", " ", "a", " a"])}
  backend = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
  # as GPT-2's: a space belongs to the word behind it
  backend.pre_tokenizer = Split(Regex(" ?[^ ]+| "), "isolated")
  names = {"eos_token": "<end>", "pad_token": "<end>"}
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
  rows = pairs(("ask: ", "a"), ("ask:", " a"), ("ask:", " a a"))
  tokens = tokenise(rows, tokenizer, 99, None, completions=PLAIN)
  assert tokens.counts["split_apart"] == 1
  assert tokens.ids.tolist() == [1, 4, 0, 1, 4, 0, 1, 4, 4, 0]
  chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
  tokenizer.chat_template = chat
  rows = conversations(("ask:", " a"), ("ask:", " a", "ask: ", "a"))
  tokens = tokenise(rows, tokenizer, 99, None, completions=CHAT)
  assert tokens.counts["split_apart"] == 1


def test_parts_of_characters_and_words_belong_to_their_answer():
  folder = Path(__file__).resolve().parents[3] / "shared/data/tokenizers/gpt2"
  if not folder.is_dir():
    pytest.skip("GPT-2's tokenizer is not beside the checkout")
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
  )
  rows = [
    ("Say it: ☃ ", "☃☃ schön 👩‍🔬!\n\n"),
    ("Two words", " and a third"),
    ("é", "日本語のテキスト"),
  ]
  for (_, own), (_, answer) in zip(
    learned(pairs(*rows), tokenizer, PLAIN), rows, strict=True
  ):
    assert tokenizer.decode(own).strip(" ") == f"{answer}<|endoftext|>".strip()


def test_special_tokens_without_a_role_count_as_well():
  tokenizer = chat_tokenizer(TEMPLATE.replace("<end>\n word9 ", "<|>\n"))
  # a line's end is a token here, so that it could be learned
  tokenizer.add_tokens([AddedToken("<|>", special=True), "\n"])
  rows = conversations(("word1", "word2"), ("word1 <|>", "word2"))
  end = tokenizer.convert_tokens_to_ids("<|>")
  for ids, own in learned(rows, tokenizer, CHAT):
    assert own.tolist() == [5, end] and ids[-1] == end
  tokens = tokenise(rows, tokenizer, 99, None, completions=CHAT)
  assert tokens.counts["special"] == 1
