"""Errors that a person can mend: scripts print them without a traceback."""


class UserError(Exception):
  """Says what is wrong with the user's input and what to do about it."""
