"""Errors that a person can mend: scripts print them without a traceback."""

from importlib.metadata import PackageNotFoundError, distribution


class UserError(Exception):
  """Says what is wrong with the user's input and what to do about it."""


def install(extra: str) -> str:
  """The command that installs an extra of this package, a key of
  `optional-dependencies` in pyproject.toml.

  In a checkout that isn't installed pip knows no extras, but their files.
  """
  try:
    distribution("vera_jax")
  except PackageNotFoundError:
    return f"pip install -r requirements-{extra}.txt"
  return f"pip install 'vera_jax[{extra}]'"
