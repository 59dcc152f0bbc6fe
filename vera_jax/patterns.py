"""Regular expressions over names of layers, matched in bounded time.

Patterns come from configs, and from files that strangers made: an adapter's
targets, PEFT's target_modules. Python's `re` can search for years, for instance
for ((a|a)*)*b in a row of a's. The package `regex`, which transformers brings,
takes a time limit.
"""

import re
from functools import lru_cache
from typing import Any

from vera_jax.errors import UserError

SECONDS = 0.2  # per try; an ordinary pattern takes some microseconds
LONGEST = 2000  # characters; 24 layers by their whole names are about 1,200


@lru_cache(maxsize=256)
def _compiled(pattern: str, within: str) -> Any:
  """The pattern within another one, after a look at the pattern alone."""
  if len(pattern) > LONGEST:
    raise UserError(
      f"The pattern {pattern[:40]!r}... has {len(pattern)} characters; at most"
      f" {LONGEST} are allowed. Write a shorter one, or several."
    )
  import regex  # --help needs none

  try:
    re.compile(pattern)  # `regex` knows more, such as recursion
    return regex.compile(within.format(pattern))
  except (re.error, regex.error, OverflowError, RecursionError) as error:
    raise UserError(
      f"The pattern {pattern!r} is no proper regular expression: {error}."
    ) from error


def find(pattern: str, name: str, *, within: str = r"(?:{})\Z") -> Any:
  """The match of a pattern in a name, or None.

  Args:
    pattern: a regular expression.
    name: of a layer.
    within: the expression that is matched from the name's beginning, with {}
      for the pattern.

  Raises:
    UserError: it is no regular expression, or takes too long.
  """
  compiled = _compiled(pattern, within)
  # A busy machine may leave the process waiting in the middle of a match, which
  # counts as well: an ordinary pattern is through at the second try.
  for tries in (1, 2):
    try:
      return compiled.match(name, timeout=SECONDS)
    except (TimeoutError, MemoryError) as error:
      if tries == 2:
        raise UserError(
          f"Matching the pattern {pattern!r} with {name!r} takes too long."
          " Write it without repetitions inside repetitions."
        ) from error
