"""The metrics give the challenge's published figures."""

import importlib.util
import math
import shutil

import pytest

from vera_jax.errors import UserError, install
from vera_jax.tasks import e2e_metrics
from vera_jax.tasks.e2e_files import read_for_scoring
from vera_jax.tasks.e2e_metrics import (
  METRICS,
  nist,
  score_texts,
  without_java,
)

# The challenge's baseline on the test set: published in arXiv 1810.01170 but
# for NIST, which is what github.com/tuetschek/e2e-metrics gives with -p.
TGEN = {
  "BLEU": 0.6593,
  "NIST": 8.5923,
  "NIST_perl": 8.6094,
  "METEOR": 0.4483,
  "ROUGE_L": 0.6850,
  "CIDEr": 2.2338,
}
# The same scorer on the outputs that come with it.
DEVELOPMENT = {"BLEU": 0.7203, "NIST": 7.7889}
needs_java = pytest.mark.skipif(
  not shutil.which("java") or importlib.util.find_spec("pycocoevalcap") is None,
  reason="Java or pycocoevalcap is not installed",
)


@pytest.fixture
def no_java(monkeypatch):
  monkeypatch.setattr(e2e_metrics, "without_java", lambda: "no Java here")


def rounded(values):
  return {name: round(value, 4) for name, value in values.items()}


def tgens_scores(folder):
  outputs = folder / "metrics_check/tgen_test_output.tsv"
  return score_texts(*read_for_scoring(outputs, folder / "testset_w_refs.csv"))


def test_tgens_published_figures(e2e_folder, no_java):
  scores = tgens_scores(e2e_folder)
  assert scores.missing == "no Java here"
  names = METRICS[:3]
  assert rounded(scores.values) == {name: TGEN[name] for name in names}


@needs_java
@pytest.mark.parity
def test_all_of_tgens_published_figures(e2e_folder, monkeypatch):
  """Also in a locale with decimal commas."""
  italian = "-Duser.language=it -Duser.country=IT"
  monkeypatch.setenv("JAVA_TOOL_OPTIONS", italian)
  assert rounded(tgens_scores(e2e_folder).values) == TGEN


def test_the_challenges_example(e2e_folder, no_java):
  folder = e2e_folder / "metrics_check"
  texts = read_for_scoring(
    folder / "baseline-output.txt", folder / "devel-conc.txt"
  )
  found = rounded(score_texts(*texts).values)
  assert {name: found[name] for name in DEVELOPMENT} == DEVELOPMENT


def test_nist_by_hand():
  """Two inputs; "a" comes 3 times in the references, "b" once, of 6 words."""
  outputs = [["a", "b"], ["a"]]
  references = [[["a", "b"], ["a"]], [["a", "c", "d"]]]
  single = (2 * math.log2(6 / 3) + math.log2(6 / 1)) / 3
  pair = math.log2(3 / 1) / 1
  penalty = {
    name: math.exp(-math.log(2) * (math.log(3 / x) / math.log(1.5)) ** 2)
    for name, x in {"NIST": 1.5 + 3, "NIST_perl": 6 / 3 * 2}.items()
  }
  found = nist(outputs, references)
  for name, factor in penalty.items():
    assert found[name] == pytest.approx(factor * (single + pair), rel=1e-12)
  # at two thirds of the length the penalty is a half
  assert penalty["NIST"] == pytest.approx(0.5)


def test_case_and_entities_make_no_difference(no_java):
  references = [["Tea & cake for £20 at Café Rouge ."], ["A pub ."]]
  one = score_texts(
    ["TEA &amp; cake for £20 at café rouge.", "a pub."], references
  )
  assert one.values["BLEU"] == pytest.approx(1)
  assert one.missing == "no Java here"


def test_texts_that_are_empty_or_short_score_nothing(no_java):
  references = [["a pub in the centre ."]]
  for text in ("", "pub"):
    assert score_texts([text], references).values["BLEU"] == 0
  assert score_texts([""], references).values["NIST"] == 0


@needs_java
def test_the_ptb_tokenizers_words(monkeypatch):
  """Whatever the locale, and with lines that are empty."""
  monkeypatch.setenv("LC_ALL", "C")
  lines = ["The Café isn't £20-25; (cheap).", "", "a\tpub\u2028here"]
  assert e2e_metrics._ptb_lines(lines) == [
    "the café is n't # 20-25 -lrb- cheap -rrb-",
    "",
    "a pub here",
  ]


def test_what_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(shutil, "which", lambda name: None)
  assert "METEOR, ROUGE_L, CIDEr are not available: they need Java" in (
    without_java()
  )
  monkeypatch.setattr(shutil, "which", lambda name: "/bin/java")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert install("e2e") in without_java()
  with pytest.raises(UserError, match="need sacrebleu: pip install .*e2e"):
    score_texts(["a"], [["a"]])


@needs_java
def test_a_java_program_that_fails_says_why(monkeypatch):
  broken = ("java", "-no-such-option")
  monkeypatch.setattr(e2e_metrics, "JAVA", broken)
  with pytest.raises(UserError, match="tokenizer failed: .*no-such-option"):
    e2e_metrics._ptb_lines(["a"])
  with pytest.raises(UserError, match="METEOR's Java program failed: .*option"):
    e2e_metrics._meteor([(["a"], ["a"])])
