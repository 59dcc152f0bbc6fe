"""Errors that scripts print without a traceback, and how a run may end."""

EXIT_CODE = 75  # EX_TEMPFAIL: the same command, run again, goes on
START, END = 350, 147  # characters of a long message that are shown


class UserError(Exception):
  """Says what is wrong with the user's input and what to do about it.

  What a message quotes out of a file may be of any length: of a long one the
  middle is left out.
  """

  def __str__(self) -> str:
    text = super().__str__()
    if len(text) <= START + len(" … ") + END:
      return text
    return f"{text[:START]} … {text[-END:]}"


class Interrupted(Exception):
  """The run was stopped and saved; the same command resumes it."""


def install(extra: str) -> str:
  """The command that installs an extra of this package, a key of
  `optional-dependencies` in pyproject.toml.

  In a checkout that isn't installed pip knows no extras, but their files.
  """
  from importlib.metadata import PackageNotFoundError, distribution

  try:
    distribution("vera_jax")
  except PackageNotFoundError:
    return f"pip install -r requirements-{extra}.txt"
  return f"pip install 'vera_jax[{extra}]'"
