"""Texts that continue prompts: batches, streams, adapters, mistakes."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.files import load_adapter
from vera_jax.data import templates
from vera_jax.errors import UserError
from vera_jax.generate.beam import Beam
from vera_jax.generate.generator import Generator
from vera_jax.generate.sampling import Sampling
from vera_jax.pretrained.classifier import load_classifier, restore_adapter

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13", "w4 w1"]


def test_answers_are_texts_without_their_end(generator):
  texts = generator.texts(PROMPTS, max_new_tokens=8)
  ids = generator.ids(
    [generator.encode(p, max_new_tokens=8) for p in PROMPTS], max_new_tokens=8
  )
  assert len(texts) == 4 and len(set(texts)) > 1
  for text, tokens in zip(texts, ids, strict=True):
    assert 0 not in tokens[:-1]
    words = [f"w{i - 3}" for i in tokens if i > 2]
    assert text == " ".join(words)


def test_a_prompt_draws_by_its_own_number(generator):
  how = Sampling(temperature=1.5)
  texts = generator.texts(PROMPTS, how=how, max_new_tokens=8, seed=1)
  assert generator.texts(PROMPTS, how=how, max_new_tokens=8, seed=1) == texts
  assert generator.texts(PROMPTS, how=how, max_new_tokens=8, seed=2) != texts
  tokens = [generator.encode(p, max_new_tokens=8) for p in PROMPTS]
  mixed = generator.ids(
    tokens[::-1], how=how, max_new_tokens=8, seed=1, numbers=[3, 2, 1, 0]
  )
  assert [generator.decode(ids) for ids in mixed] == texts[::-1]


def test_a_stream_is_the_text_in_pieces(generator):
  for how in (Sampling(), Sampling(temperature=1.5)):
    settings = {"how": how, "max_new_tokens": 8, "seed": 5}
    pieces = list(generator.stream(PROMPTS[0], **settings))
    assert len(pieces) > 1
    assert ["".join(pieces)] == generator.texts(PROMPTS[:1], **settings)


def test_a_beam_search_streams_one_piece(generator):
  settings = {"how": Beam(beams=3, length_penalty=0.8), "max_new_tokens": 8}
  prompt = PROMPTS[2]  # long enough that its beams share slots of the cache
  [text] = generator.stream(prompt, **settings)
  assert [text] == generator.texts([prompt], **settings)
  assert text and text != generator.texts(PROMPTS, max_new_tokens=8)[2]


def test_the_ids_that_end_a_text(tiny_decoder, tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(tiny_decoder, folder)
  path = folder / "generation_config.json"
  path.write_text(json.dumps({"eos_token_id": [7, 8]}))
  assert Generator(load_classifier(folder)).eos == (7, 8, 0)
  path.write_text(json.dumps({"eos_token_id": "end"}))
  with pytest.raises(UserError, match="eos_token_id is 'end'"):
    Generator(load_classifier(folder))
  path.unlink()
  assert Generator(load_classifier(folder)).eos == (0,)


def test_a_prompt_ends_as_in_training(generator):
  assert generator.encode("w1 w2", max_new_tokens=8) == [4, 5]
  about = {"separate": True}
  other = Generator(generator.decoder._replace(about=about))
  assert other.encode("w1 w2", max_new_tokens=8) == [4, 5, 0]


TEMPLATE = (
  "{% for m in messages if m.role == 'user' %}w1 {{ m.content }} w2{% endfor %}"
  "{% if add_generation_prompt %} w3{% endif %}"
)


def with_template(decoder, template, folder):
  """The decoder in a folder whose tokenizer has a chat template."""
  shutil.copytree(decoder, folder)
  (folder / "chat_template.jinja").write_text(template)
  return load_classifier(folder)


def test_a_message_is_put_into_the_chat_template(
  generator, tiny_decoder, tmp_path
):
  decoder = with_template(tiny_decoder, TEMPLATE, tmp_path / "chat")
  chat = Generator(decoder, template="chat")
  prompts = [f"w1 {prompt} w2 w3" for prompt in PROMPTS]
  for message, prompt in zip(PROMPTS, prompts, strict=True):
    ids = chat.encode(message, max_new_tokens=8)
    assert ids == generator.encode(prompt, max_new_tokens=8)
  texts = chat.texts(PROMPTS, max_new_tokens=8)
  assert texts == generator.texts(prompts, max_new_tokens=8)
  assert ["".join(chat.stream(PROMPTS[0], max_new_tokens=8))] == texts[:1]
  # asked so by itself where it was trained so
  own = Generator(decoder._replace(about={"template": "chat"}))
  assert own.encode(PROMPTS[0], max_new_tokens=8) == chat.encode(
    PROMPTS[0], max_new_tokens=8
  )
  about = {"separate": True}  # the template alone says how a message ends
  chat = Generator(decoder._replace(about=about), template="chat")
  assert chat.encode("w5", max_new_tokens=8) == [4, 8, 5, 6]


def test_a_chat_that_can_not_begin(
  generator, tiny_decoder, tmp_path, monkeypatch
):
  with pytest.raises(UserError, match=r"tiny_decoder\d+ has no chat template"):
    Generator(generator.decoder, template="chat")
  refusing = "{{ raise_exception('a system message is needed') }}"
  decoder = with_template(tiny_decoder, refusing, tmp_path / "chat")
  with pytest.raises(UserError, match="can't be used: a system message is"):
    Generator(decoder, template="chat")
  found = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec",
    lambda name, *more: None if name == "jinja2" else found(name, *more),
  )
  with pytest.raises(UserError, match="pip install -U jinja2"):
    Generator(decoder, template="chat")


def test_prompts_that_can_not_be_continued(generator):
  for prompts, words in (
    ("w1", "list of prompts"),
    (["w1", ""], "Prompt 2: The prompt is empty"),
    (["w1 " * 45], "45 tokens, and with 8 .* more than the 48"),
  ):
    with pytest.raises(UserError, match=words):
      generator.texts(prompts, max_new_tokens=8)
  with pytest.raises(UserError, match="token 99, but .* before 23"):
    generator.ids([[5, 99]], max_new_tokens=8)
  with pytest.raises(UserError, match="max_new_tokens is 0"):
    generator.texts(["w1"], max_new_tokens=0)
  with pytest.raises(UserError, match="beams is 0"):
    generator.texts(["w1"], how=Beam(beams=0), max_new_tokens=8)
  assert generator.ids([]) == []
  just_fits = [*PROMPTS[:3], "w1 " * 40]
  assert len(generator.texts(just_fits, max_new_tokens=8)) == 4


def test_a_classifier_writes_no_texts(generator):
  other = generator.decoder._replace(kind="classification")
  with pytest.raises(UserError, match="vera-jax predict"):
    Generator(other)


def test_padding_changes_nothing(generator):
  prompts = [generator.encode(p, max_new_tokens=8) for p in PROMPTS]
  apart = generator.ids(prompts, max_new_tokens=8)
  # a longer one makes all rows of the batch as wide
  prompts[2] = [5] * 33
  together = generator.ids(prompts, max_new_tokens=8)
  assert together[:2] == apart[:2] and together[3] == apart[3]


def test_logits_that_are_no_numbers_are_an_error(generator):
  """One word's weights are harmed; the prompt that has it is named."""
  params = flatten_dict(generator.decoder.params)
  path = ("embeddings", "wpe", "embedding")
  params[path] = params[path].at[9].set(np.nan)  # the tenth place
  other = generator.decoder._replace(params=unflatten_dict(params))
  harmed = Generator(other)
  prompts = ["w4", "w1 " * 9 + "w2", "w4 w1"]
  for how in (Sampling(), Beam(beams=3, length_penalty=0.8)):
    with pytest.raises(UserError, match="Prompt 2: .* loss of its training"):
      harmed.texts(prompts, how=how, max_new_tokens=8)
  with pytest.raises(UserError, match="in float32 overflows"):
    list(harmed.stream(PROMPTS[0], max_new_tokens=8))


def test_stacked_layers_are_looped(tiny_decoder, words_adapter):
  """What was loaded either way gives the same, and only looped weights stay."""
  for load in (
    lambda scan: load_classifier(tiny_decoder, scan=scan),
    lambda scan: restore_adapter(load_adapter(words_adapter), scan=scan),
  ):
    one, two = (
      Generator(load(scan), keep_adapter=True) for scan in (False, True)
    )
    assert not getattr(two.module, "model", two.module).scan
    jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)
    assert two.decoder.params is two.variables["params"]


def test_the_template_is_the_one_of_training_unless_another_is_named(
  generator, monkeypatch
):
  prompt = "w1 {instruction} w2"
  monkeypatch.setattr(templates, "WITHOUT_INPUT", prompt)
  tuned = generator.decoder._replace(about={"template": "alpaca"})
  for decoder, template, expected in (
    (generator.decoder, None, [8]),
    (generator.decoder, "alpaca", [4, 8, 5]),
    (tuned, None, [4, 8, 5]),
    (tuned, "plain", [8]),
  ):
    asked = Generator(decoder, template=template)
    assert asked.encode("w5", max_new_tokens=8) == expected
  with pytest.raises(UserError, match="no template 'llama'.*chat, alpaca"):
    Generator(generator.decoder, template="llama")
