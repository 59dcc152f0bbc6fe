"""Many threads at once: no answer is another adapter's, or to other tokens.

BANK_SECONDS=60 python -m pytest tests/serve/test_threads.py -s
"""

import itertools
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from tests.serve.test_bank import TEXTS, another
from vera_jax.adapters.files import load_adapter
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import Classifier
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.predictor import encode

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("BANK_SECONDS", 2))
THREADS, LEAST = 16, 10  # actions of each thread, however long they take
ROOM, NAMES = 2, ("a", "b", "c")  # one more than there is room for
ASKED = TEXTS[8:10]  # which a short limit cuts; both have room in one row
DOCUMENTED = ("has no adapter", "already", "is full")


@pytest.fixture(scope="module")
def versions(random_adapter):
  """Two adapters for each name, one of which cuts texts. Their labels say whose
  an answer is."""
  saved = load_adapter(random_adapter(task="sst2"))
  return {
    f"{name}{n}": another(
      saved,
      2 * i + n,
      labels=[f"{name}{n} no", f"{name}{n} yes"],
      **({"max_length": 6} if n else {}),
    )
    for i, name in enumerate(NAMES)
    for n in range(2)
  }


def test_no_answer_is_another_adapters(versions):
  bank = AdapterBank({"a": versions["a0"]}, capacity=ROOM)
  chances = {}
  for version, adapter in versions.items():  # one thread is right: test_bank.py
    bank.replace("a", adapter)
    chances[version] = softmax(bank.logits(ASKED, adapters="a"), -1)
  cut_before = bank.truncated

  def ask(names):
    """Which version of each name answered: one for all of its texts."""
    texts = [text for _ in names for text in ASKED]
    owners = [name for name in names for _ in ASKED]
    answers = bank.answers(texts, adapters=owners)
    assert len(answers) == len(texts)
    of_name = {}
    for number, (name, answer) in enumerate(zip(owners, answers, strict=True)):
      version = answer.label.split()[0]
      assert of_name.setdefault(name, version) == version
      assert version[0] == name
      want = chances[version][number % len(ASKED)]
      np.testing.assert_allclose(answer.probabilities, want, atol=1e-4)
    return [of_name[name] for name in names]

  def work(seed):
    rng, done = np.random.default_rng(seed), Counter()
    for count in itertools.count():
      if count >= LEAST and time.monotonic() > end:
        return done
      name = str(rng.choice(NAMES))
      version = versions[f"{name}{rng.integers(2)}"]
      what = str(rng.choice(["add", "replace", "remove", "ask", "ask", "ask"]))
      try:
        if what == "add":
          bank.add(name, version)
        elif what == "replace":
          bank.replace(name, version)
        elif what == "remove":
          bank.remove(name)
        else:
          for found in ask([name, *map(str, list(bank)[:1])]):
            done["cut"] += found.endswith("1") * len(ASKED)
        done[what] += 1
      except UserError as error:
        assert any(words in str(error) for words in DOCUMENTED), error
        done["refused"] += 1

  bank.replace("a", versions["a0"])
  ask(["a", "a"])  # compiles the larger batch
  end = time.monotonic() + SECONDS
  apart = [abs(chances[f"{n}0"] - chances[f"{n}1"]).max() for n in NAMES]
  assert min(apart) > 1e-2
  with ThreadPoolExecutor(THREADS) as pool:
    done = sum(pool.map(work, range(THREADS)), Counter())
  print(dict(done))
  assert done.keys() == {"add", "replace", "remove", "ask", "cut", "refused"}
  assert bank.truncated == cut_before + done["cut"]
  assert len(bank) <= ROOM
  for name in list(bank):
    bank.remove(name)
  for name in NAMES[:ROOM]:
    bank.add(name, versions[f"{name}0"])
  assert ask(NAMES[:ROOM]) == [f"{name}0" for name in NAMES[:ROOM]]
  with pytest.raises(UserError, match="is full"):
    bank.add(NAMES[ROOM], versions[f"{NAMES[ROOM]}0"])


def test_no_thread_cuts_anothers_texts(tiny_model):
  """Where texts are cut is a setting of the tokenizer, which all share."""
  tokenizer = load_tokenizer(tiny_model)
  config = SimpleNamespace(vocab_size=30)
  unknown: Any = dict.fromkeys(Classifier._fields)
  classifier = Classifier(**unknown | {"config": config})

  def lengths(limit):
    texts = ["word1 " * 18] * 50
    tokens = encode(classifier, tokenizer, texts, None, limit=limit)
    return set(tokens.lengths.tolist())

  limits = [6, 7, 8] * 20
  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-5)  # seconds: threads change in the midst of a call
  try:
    with ThreadPoolExecutor(8) as pool:
      found = list(pool.map(lengths, limits))
  finally:
    sys.setswitchinterval(interval)
  assert found == [{limit} for limit in limits]
