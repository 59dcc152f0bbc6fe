"""Patterns over names: what matches, and that no pattern takes for ever."""

import time

import pytest

from vera_jax import patterns
from vera_jax.adapters.sites import matches
from vera_jax.errors import UserError
from vera_jax.peft_io.settings import PeftSettings, is_target

PATH = ("encoder", "layer_11", "attention", "self", "query")
ENDLESS = [
  "(a|a)*(e|e|nc)*[a-z]*(([a-z/_0-9])+)+$Q",
  "(?:(?:.|[a-z/_])+)+[QX]",
  "(?:(?:a|b|.){0,1000}){0,1000}[QX]",
  "(?:.|.|.|.|[a-z_/])+[QX]",
]


@pytest.mark.parametrize(
  "pattern, expected",
  [
    ("query", True),
    ("self/query", True),
    ("encoder/.*", True),
    ("^encoder/layer_1+/.*query", True),
    ("key|query", True),
    (r"layer(_\d+)?/attention/self/(query|key)", True),
    (r"(?!.*key).*/\w+", True),
    ("uery", False),
    ("^query", False),
    ("layer_1/attention/self/query", False),
  ],
)
def test_a_pattern_matches_the_last_names_in_full(pattern, expected):
  assert matches(pattern, PATH) == expected


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_pattern_takes_for_ever(pattern):
  """Answered, or refused by name; never waited for."""
  name = ".".join(PATH)
  settings = PeftSettings("vera", {}, "vera", None, pattern)
  lists = settings._replace(
    targets=("query",), layers=(1,), layers_pattern=(pattern,)
  )
  started = time.process_time()
  for ask in (
    lambda: matches(pattern, (*PATH, "a" * 40)),
    lambda: is_target(settings, name),
    lambda: is_target(lists, name),
    lambda: is_target(lists._replace(modules_to_save=(pattern,)), name),
  ):
    try:
      assert not ask()
    except UserError as error:
      assert "takes too long" in str(error)
  assert time.process_time() - started < 2


def test_a_pause_in_the_middle_of_a_match_refuses_nothing(monkeypatch):
  """A study on a busy machine lost a run to one."""
  answers = iter([TimeoutError(), "found"])

  class Paused:
    def match(self, name, *, timeout):
      if isinstance(answer := next(answers), Exception):
        raise answer
      return answer

  monkeypatch.setattr(patterns, "_compiled", lambda *_: Paused())
  assert patterns.find("query", "query") == "found"


@pytest.mark.parametrize(
  "pattern, words",
  [
    ("que(", "'que\\(' is no proper regular expression"),
    ("*query", "no proper regular expression"),
    ("a{99999999999}", "no proper regular expression"),
    ("(" * 900 + ")" * 900, "no proper regular expression"),
    ("query" * 1000, "has 5000 characters; at most"),
  ],
)
def test_what_is_no_pattern_is_refused(pattern, words):
  with pytest.raises(UserError, match=words):
    matches(pattern, PATH)
