"""Errors that scripts print without a traceback, and how a run may end."""

EXIT_CODE = 75  # EX_TEMPFAIL: the same command, run again, goes on
START, END = 350, 147  # characters of a long line that are shown
FIRST, LAST = 40, 10  # lines of a long message that are shown


class UserError(Exception):
  """Says what is wrong with the user's input and what to do about it.

  What a message quotes out of a file may be of any length: the middle of long
  lines, and of very many, is left out.
  """

  def __str__(self) -> str:
    lines = super().__str__().split("\n")
    if len(lines) > FIRST + 1 + LAST:
      lines = [*lines[:FIRST], "…", *lines[-LAST:]]
    return "\n".join(
      line
      if len(line) <= START + len(" … ") + END
      else f"{line[:START]} … {line[-END:]}"
      for line in lines
    )


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
