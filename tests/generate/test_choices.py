"""Multiple choice: the forms of questions, and how choices are scored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset

from tests.tasks.decoder_files import GPT2, write_decoder
from vera_jax.data.chat import Rendered
from vera_jax.errors import UserError
from vera_jax.generate import choices
from vera_jax.generate.choices import (
  ChoiceQuestion,
  answer_questions,
  log_likelihoods,
  read_choices,
)
from vera_jax.models.decoder import logits
from vera_jax.pretrained.classifier import load_classifier

COPA = {
  "premise": "The man broke his toe.",
  "choice1": "He got a hole in his sock.",
  "choice2": "I dropped a hammer.",
  "question": "cause",
  "label": 1,
}
TEXTS = [{"text": "Air", "label": "A"}, {"text": "Ice", "label": "B"}]
ARC = {"question": {"stem": "Cold?", "choices": TEXTS}, "answerKey": "B"}
HUB = {
  "question": "Cold?",
  "choices": {"text": ["Air", "Ice"], "label": ["A", "B"]},
  "answerKey": "B",
}


def read(folder, row):
  path = folder / "some.jsonl"
  path.write_text(json.dumps(row))
  return read_choices([str(path)])["some"]


def test_both_forms_become_a_prompt_and_its_choices(tmp_path):
  assert read(tmp_path, COPA) == [
    ChoiceQuestion(
      "The man broke his toe because",
      (" he got a hole in his sock.", " i dropped a hammer."),
      1,
    )
  ]
  arc = [ChoiceQuestion("Question: Cold?\nAnswer:", (" Air", " Ice"), 1)]
  assert read(tmp_path, ARC) == read(tmp_path, HUB) == arc


@pytest.mark.parametrize(
  "row, message",
  [
    ({**COPA, "question": "why"}, "some.jsonl:1.*'why', neither cause nor"),
    ({**COPA, "label": -1}, "label is -1, neither 0 nor 1"),
    ({**ARC, "answerKey": "C"}, "answerKey is 'C', no choice's label"),
    ({**HUB, "choices": None}, "it has no choices"),
    (
      {**HUB, "choices": {"text": ["a"], "label": ["A", "B"]}},
      "it has 1 choices, but 2 labels",
    ),
    (
      {**HUB, "choices": {"text": ["a", "b"], "label": ["B", "B"]}},
      r"two choices have one label: \['B', 'B'\]",
    ),
    (
      {**ARC, "question": {"stem": "Cold?", "choices": TEXTS[1:]}},
      "some.jsonl:1.*two choices are needed at least",
    ),
    ({**COPA, "choice2": " "}, "none may be empty"),
    ({"text": "a"}, "columns text are neither COPA's"),
  ],
)
def test_what_is_no_question_is_refused(row, message, tmp_path):
  with pytest.raises(UserError, match=message):
    read(tmp_path, row)


def test_a_split_of_the_hub_without_questions_is_refused(monkeypatch):
  empty = Dataset.from_dict({name: [] for name in COPA})
  monkeypatch.setattr(choices, "download", lambda *names: {"test": empty})
  with pytest.raises(UserError, match=r"copa:test \(test\) has no questions"):
    read_choices(["aps/super_glue:copa:test"])


def test_a_choices_likelihood_is_that_of_its_own_tokens(tmp_path, monkeypatch):
  model = load_classifier(write_decoder(tmp_path, GPT2))
  rng = np.random.default_rng(0)
  rows = np.zeros((4, 12), np.int32)
  texts, parts = [], []
  for prompt, choice in ((2, 1), (3, 4), (9, 2), (1, 6)):
    words = [f"word{i}" for i in rng.integers(0, 20, prompt + choice)]
    text = " ".join(words)
    texts.append(Rendered(text, [(len(" ".join(words[:prompt])), len(text))]))
    rows[len(parts), : len(words)] = [3 + int(word[4:]) for word in words]
    parts.append(range(prompt, prompt + choice))
  apply = jax.jit(lambda ids: logits(model.module.apply(model.variables, ids)))
  # what follows a text changes none of its own words' chances
  chances = jax.nn.log_softmax(apply(jnp.asarray(rows)))
  expected = [
    sum(float(chances[row, i - 1, rows[row, i]]) for i in own)
    for row, own in enumerate(parts)
  ]
  monkeypatch.setattr(choices, "STEP", 4)
  monkeypatch.setattr(choices, "TOKENS", 16)  # several batches and lengths
  done = []
  found = log_likelihoods(model, texts, progress=done.append)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert done[-1] == 4 and len(done) > 1

  own = [text.text[slice(*text.spans[0])] for text in texts]
  prompts = {text.text[: text.spans[0][0]] for text in texts}
  assert len(prompts) == 4
  questions = [
    ChoiceQuestion(text.text[: text.spans[0][0]], (choice, " word1"), 0)
    for text, choice in zip(texts, own, strict=True)
  ]
  both = log_likelihoods(
    model,
    [
      Rendered(q.prompt + c, [(len(q.prompt), len(q.prompt + c))])
      for q in questions
      for c in q.choices
    ],
  ).reshape(4, 2)
  lengths = [[len(c) - 1 for c in q.choices] for q in questions]
  accuracy = answer_questions(model, questions)
  assert accuracy.plain == np.mean(both[:, 0] > both[:, 1])
  per_letter = both / np.array(lengths)
  assert accuracy.normalised == np.mean(per_letter[:, 0] > per_letter[:, 1])
  broken = both.ravel()
  broken[1] = np.nan
  monkeypatch.setattr(choices, "log_likelihoods", lambda *a, **k: broken)
  with pytest.raises(UserError, match="nan], not finite numbers"):
    answer_questions(model, questions)
  long = Rendered("word1 " * 30, [(6, 12)])
  with pytest.raises(UserError, match="30 tokens, but the model has room"):
    log_likelihoods(model, [long])
