"""Libraries that other libraries import where they are installed.

transformers imports torch for its models, of which none is used here, and so
do others: 170 MB of memory, and seconds.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_is_torch_used = True


@contextmanager
def no_torch_in_transformers() -> Iterator[None]:
  """Meanwhile `transformers` is imported without torch, and stays so.

  For a process that is a command: in another one transformers' models may be
  wanted as well.
  """
  global _is_torch_used
  before, _is_torch_used = _is_torch_used, False
  try:
    yield
  finally:
    _is_torch_used = before


def transformers() -> ModuleType:
  """The library, which takes seconds, so not before it is needed."""
  # It looks for torch once, when it is imported.
  with without(*(() if _is_torch_used else ("torch",))):
    import transformers
  return transformers


@contextmanager
def without(*names: str) -> Iterator[None]:
  """Meanwhile these can't be imported, unless they have been before.

  For single imports: scipy fails where it meets what is hidden so.
  """
  hidden = set(names) - sys.modules.keys()
  for name in hidden:
    sys.modules[name] = None  # type: ignore[assignment]  # not found then
  try:
    yield
  finally:
    for name in hidden:
      sys.modules.pop(name, None)
