"""Libraries that other libraries import where they are installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str) -> Iterator[None]:
  """Meanwhile these can't be imported, unless they have been before."""
  hidden = set(names) - sys.modules.keys()
  for name in hidden:
    sys.modules[name] = None  # type: ignore[assignment]  # not found then
  try:
    yield
  finally:
    for name in hidden:
      sys.modules.pop(name, None)
