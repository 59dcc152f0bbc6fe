"""Methods without leaves of their own: they train leaves of the base itself."""

from dataclasses import KW_ONLY, dataclass

from vera_jax.adapters.interface import Adapter, as_they_are
from vera_jax.adapters.method import Method, NoSettings, setting
from vera_jax.patterns import find

ALL = r".*"  # the pattern of every leaf


@dataclass(frozen=True)
class Biases:
  _: KW_ONLY
  biases: str = setting(
    ALL,
    "a pattern of the layers whose biases are trained, LayerNorms' among them:"
    " query|value for these two alone, as the paper also tries",
  )


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


bitfit = Method(
  "bitfit",
  make_bitfit,
  Biases,
  config=dict(lr=1e-3, head_lr=1e-3),
  title="BitFit",
  weights="W0; the base's biases are trained",
  paper="2106.10199",
)
norms = Method(
  "norms",
  make_norms,
  NoSettings,
  config=dict(lr=1e-3, head_lr=1e-3),
  title="norms alone",
  weights="W0; scales and biases of what normalises are trained",
  paper="2003.00152",
)
head = Method(
  "head",
  make_head,
  NoSettings,
  config=dict(head_lr=None),
  title="head alone",
  weights="W0; the head alone is trained",
  trained="0",
)
full = Method(
  "full",
  make_full,
  NoSettings,
  config=dict(lr=2e-5, head_lr=2e-5),
  title="full",
  weights="all weights are trained",
)
