"""Methods without leaves of their own: they train leaves of the base itself."""

from vera_jax.adapters.interface import Adapter, as_they_are
from vera_jax.patterns import find

ALL = r".*"  # the pattern of every leaf


def bitfit(*, biases: str = ALL) -> Adapter:
  """BitFit (arXiv 2106.10199): biases, by default all, LayerNorms' among them.

  Args:
    biases: a pattern of the layers whose biases are trained, as a target is:
      "query|value" for these two alone. The paper tries some such choices too.

  Raises:
    UserError: it is no regular expression.
  """
  find(biases, "")
  trains = rf"(?:.*/)?(?:{biases})/bias"
  return Adapter(name="bitfit", trains=trains, prepare=as_they_are)


def norms() -> Adapter:
  """What normalises alone: the scales and biases of BatchNorms (arXiv
  2003.00152), LayerNorms and RMSNorms."""
  trains = r".*(norm|LayerNorm|ln_)[^/]*/(scale|bias)"
  return Adapter(name="norms", trains=trains, prepare=as_they_are)


def head() -> Adapter:
  """The task's head alone, on the frozen base."""
  return Adapter(name="head", prepare=as_they_are)


def full() -> Adapter:
  """Full fine-tuning: every leaf of the base."""
  return Adapter(name="full", trains=ALL)
