"""Cases of a parametrised test of which only the first ones are quick."""

from collections.abc import Iterable
from typing import Any

import pytest


def rest_is_slow(cases: Iterable[Any], *, quick: int = 1) -> list[Any]:
  """All but the first `quick` cases are left to `make test-all`.

  A plain tuple has several arguments; a method, a named tuple, is one.
  """
  cases = list(cases)
  rest = [case if type(case) is tuple else (case,) for case in cases[quick:]]
  return [
    *cases[:quick],
    *(pytest.param(*case, marks=pytest.mark.slow) for case in rest),
  ]
