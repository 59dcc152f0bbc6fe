"""Methods without leaves of their own: they train leaves of the base itself."""

from vera_jax.adapters.interface import Adapter, as_they_are
from vera_jax.adapters.method import NoSettings
from vera_jax.adapters.table import ALL, Biases
from vera_jax.adapters.table import bitfit as bitfit
from vera_jax.adapters.table import full as full
from vera_jax.adapters.table import head as head
from vera_jax.adapters.table import norms as norms
from vera_jax.patterns import find


def make_bitfit(s: Biases) -> Adapter:
  """BitFit (arXiv 2106.10199): the base's biases."""
  find(s.biases, "")  # refuses what is no regular expression
  trains = rf"(?:.*/)?(?:{s.biases})/bias"
  return Adapter(name="bitfit", trains=trains, prepare=as_they_are)


def make_norms(s: NoSettings) -> Adapter:
  """What normalises alone: the scales and biases of BatchNorms (arXiv
  2003.00152), LayerNorms and RMSNorms."""
  trains = r".*(norm|LayerNorm|ln_)[^/]*/(scale|bias)"
  return Adapter(name="norms", trains=trains, prepare=as_they_are)


def make_head(s: NoSettings) -> Adapter:
  """The task's head alone, on the frozen base."""
  return Adapter(name="head", prepare=as_they_are)


def make_full(s: NoSettings) -> Adapter:
  """Full fine-tuning: every leaf of the base."""
  return Adapter(name="full", trains=ALL)
