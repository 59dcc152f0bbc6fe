"""VeRA, Vector-based Random Matrix Adaptation, in JAX and Flax.

What a notebook needs:

  vera, lora, ia3, dora, dvora, pvera, randlora, unilora, lora_fa, onelora,
  lora_xs             an adapter method, as all that docs/methods.md names
  chain               several methods on one network
  adapt               put it on any linen model; what it returns has `init_on`,
                      `summary`, `save`, `load` and `merge`
  find_targets        the layers that patterns match, with their widths
  adapter_size        trained numbers, counted from shapes
  merge               fold the trained adapter into the kernels
  make_pair, digest   the frozen random matrices A, B, and their fingerprint
  label_tree, split, join, count   adapter, head and frozen parameters
  train_and_evaluate  a whole run from a config
  train_ensemble      several runs at once, on one base
  group_key           runs with equal keys can train so
  load_adapter        a trained adapter's folder, two small files, read
  push_adapter        an adapter's folder to the Hugging Face hub
  restore_adapter     a loaded adapter on its base: a whole classifier
  load_classifier     a merged (or any other) classifier's folder
  write_merged        a classifier as a plain Hugging Face checkpoint
  Predictor           answers of a classifier to texts
  ImagePredictor      and to images
  Generator           texts that a decoder continues prompts with
  Sampling, Beam      how it chooses the words
  AdapterBank         many adapters on one base, mixed in one batch
  report              a package: results as DataFrames and figures
  UserError           what is raised for input that the user can mend
"""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vera_jax.version import __version__

# None of it is imported before it is used: flags and configs need nothing of
# JAX, and JAX's users nothing of what reads texts. `__getattr__` reads here
# where a name comes from.
if TYPE_CHECKING:
  from vera_jax.adapters.apply import adapt, find_targets
  from vera_jax.adapters.chain import chain
  from vera_jax.adapters.counting import adapter_size
  from vera_jax.adapters.files import SavedAdapter, load_adapter
  from vera_jax.adapters.interface import Adapter, Target
  from vera_jax.adapters.labels import count, join, label_tree, split
  from vera_jax.adapters.merge import merge
  from vera_jax.adapters.projections import digest, make_pair
  from vera_jax.adapters.push import push_adapter
  from vera_jax.adapters.table import METHODS as METHODS
  from vera_jax.adapters.table import (
    dora,
    dvora,
    ia3,
    lora,
    lora_fa,
    onelora,
    pvera,
    randlora,
    unilora,
    vera,
  )
  from vera_jax.errors import UserError
  from vera_jax.export.hf import write_merged
  from vera_jax.generate.beam import Beam
  from vera_jax.generate.generator import Generator
  from vera_jax.generate.sampling import Sampling
  from vera_jax.pretrained.classifier import (
    Classifier,
    load_classifier,
    restore_adapter,
  )
  from vera_jax.serve.bank import AdapterBank
  from vera_jax.serve.image_predictor import ImagePredictor
  from vera_jax.serve.predictor import Predictor
  from vera_jax.train.ensemble import group_key, train_ensemble
  from vera_jax.train.loop import train_and_evaluate


def __getattr__(name: str) -> Any:
  if name in (modules := _modules()):
    value = getattr(import_module(modules[name]), name)
  elif name.startswith("_") or name not in _methods():
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  else:  # a method needs no line here
    value = _methods()[name]
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__, *_methods()})


@cache
def _modules() -> dict[str, str]:
  """The module of each name that this file imports for those who read it."""
  tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
  return {
    alias.name: str(node.module)
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }


def _methods() -> Any:
  return import_module("vera_jax.adapters.table").METHODS


__all__ = [
  "__version__",
  "Adapter",
  "AdapterBank",
  "Beam",
  "Classifier",
  "Generator",
  "ImagePredictor",
  "Predictor",
  "Sampling",
  "SavedAdapter",
  "Target",
  "UserError",
  "adapt",
  "adapter_size",
  "chain",
  "count",
  "digest",
  "dora",
  "dvora",
  "find_targets",
  "group_key",
  "ia3",
  "join",
  "label_tree",
  "load_adapter",
  "load_classifier",
  "lora",
  "lora_fa",
  "make_pair",
  "merge",
  "onelora",
  "push_adapter",
  "pvera",
  "randlora",
  "restore_adapter",
  "split",
  "train_and_evaluate",
  "train_ensemble",
  "unilora",
  "vera",
  "write_merged",
]
