"""The generated task is what its docstring says, and has no shortcut."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.make_entailment import (
  HELD_OUT_WORDS,
  NEW_PATTERNS,
  SEEN_PATTERNS,
  TRAIN_WORDS,
  Pair,
  Pattern,
  make_splits,
  write_split,
)

COMMITTED = Path(__file__).resolve().parents[1] / "experiments/entailment"
SIZES = {"train": 2000, "dev": 640, "test": 320}
CHANCE = pytest.approx(0.5, abs=0.05)  # 640 pairs: two and a half deviations


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
  return make_splits(seed=0)


def _regex(pattern: Pattern) -> re.Pattern[str]:
  text = f"{pattern.premise}\t{pattern.hypothesis}"
  return re.compile(r"\w+".join(map(re.escape, re.split(r"{\w+}", text))))


def _pattern(pair: Pair) -> int:
  """The one pattern that a pair follows; train's come first."""
  text = f"{pair.premise}\t{pair.hypothesis}"
  patterns = SEEN_PATTERNS + NEW_PATTERNS
  found = [i for i, p in enumerate(patterns) if _regex(p).fullmatch(text)]
  assert len(found) == 1, (pair, found)
  return found[0]


def _listed(words: dict[str, list[str]]) -> set[str]:
  lists = (part for items in words.values() for part in items)
  return {word.lower() for item in lists for word in item.split(":")}


def _labels(pairs: list[Pair]) -> np.ndarray:
  return np.array([pair.label == "entailment" for pair in pairs])


@pytest.mark.parametrize("split", SIZES)
def test_committed_file_is_what_seed_0_gives(splits, split, tmp_path):
  write_split(tmp_path / split, splits[split], labelled=split != "test")
  committed = (COMMITTED / f"{split}.tsv").read_bytes()
  assert committed == (tmp_path / split).read_bytes()
  assert len(committed) <= 250_000


@pytest.mark.parametrize("split", SIZES)
def test_labels_are_balanced_in_each_pattern(splits, split):
  counts = Counter((_pattern(pair), pair.label) for pair in splits[split])
  for pattern, label in list(counts):
    other = {"entailment", "not_entailment"} - {label}
    assert counts[pattern, label] == counts[pattern, other.pop()]


def test_no_pair_twice(splits):
  pairs = [pair[:2] for split in splits.values() for pair in split]
  assert len(set(pairs)) == len(pairs)


def test_half_of_dev_and_test_follows_new_patterns(splits):
  new = range(len(SEEN_PATTERNS), len(SEEN_PATTERNS + NEW_PATTERNS))
  for split, share in (("train", 0.0), ("dev", 0.5), ("test", 0.5)):
    found = [_pattern(pair) in new for pair in splits[split]]
    assert np.mean(found) == share


def test_no_held_out_word_is_in_train(splits):
  held_out = _listed(HELD_OUT_WORDS)
  assert not held_out & _listed(TRAIN_WORDS)
  text = " ".join(f"{p.premise} {p.hypothesis}" for p in splits["train"])
  assert not held_out & set(re.findall(r"\w+", text.lower()))


def _overlap(pair: Pair) -> list[float]:
  """Features: overlap of words and letters, and the lengths."""
  one, two = (re.findall(r"\w+", text.lower()) for text in pair[:2])
  shared = set(one) & set(two)
  letters = [
    {text[i : i + 3] for i in range(len(text) - 2)} for text in pair[:2]
  ]
  return [
    len(shared),
    len(shared) / len(set(two)),
    len(shared) / len({*one, *two}),
    len(letters[0] & letters[1]) / len(letters[1]),
    len(one),
    len(two),
    len(one) - len(two),
    len(pair.premise) - len(pair.hypothesis),
    float(one[0] == two[0]),
    float(one[-1] == two[-1]),
    float(("not" in one) == ("not" in two)),
  ]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["premise", "hypothesis", "both"])
def test_words_alone_are_at_chance(splits, text):
  def read(pair: Pair) -> str:
    both = f"{pair.premise} {pair.hypothesis}"
    return both if text == "both" else getattr(pair, text)

  model = make_pipeline(
    CountVectorizer(preprocessor=read), LogisticRegression(max_iter=1000)
  )
  labels = _labels(splits["train"])
  within_train = cross_val_score(model, splits["train"], labels, cv=5)
  assert np.mean(within_train) == CHANCE  # dev's squares are so by themselves
  model.fit(splits["train"], labels)
  assert model.score(splits["dev"], _labels(splits["dev"])) == CHANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "forest"])
def test_overlap_and_length_are_at_chance(splits, kind):
  model = (
    make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    if kind == "linear"
    else RandomForestClassifier(min_samples_leaf=5, random_state=0)
  )
  features = {k: np.array([_overlap(p) for p in v]) for k, v in splits.items()}
  # Within train a forest finds 0.55: it knows some of train's words by their
  # number of letters. Those words aren't in dev.
  model.fit(features["train"], _labels(splits["train"]))
  assert model.score(features["dev"], _labels(splits["dev"])) == CHANCE
