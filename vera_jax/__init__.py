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

from importlib import import_module
from typing import Any

from vera_jax.version import __version__

# Where each name comes from. It is imported when it is used: flags and configs
# need nothing of JAX, and texts nothing of what trains.
NAMES = {
  "adapters.apply": ("adapt", "find_targets"),
  "adapters.chain": ("chain",),
  "adapters.counting": ("adapter_size",),
  "adapters.files": ("SavedAdapter", "load_adapter"),
  "adapters.interface": ("Adapter", "Target"),
  "adapters.labels": ("count", "join", "label_tree", "split"),
  "adapters.merge": ("merge",),
  "adapters.methods": ("METHODS",),
  "adapters.projections": ("digest", "make_pair"),
  "adapters.push": ("push_adapter",),
  "errors": ("UserError",),
  "export.hf": ("write_merged",),
  "generate.beam": ("Beam",),
  "generate.generator": ("Generator",),
  "generate.sampling": ("Sampling",),
  "pretrained.classifier": (
    *("Classifier", "load_classifier", "restore_adapter"),
  ),
  "serve.bank": ("AdapterBank",),
  "serve.image_predictor": ("ImagePredictor",),
  "serve.predictor": ("Predictor",),
  "train.ensemble": ("group_key", "train_ensemble"),
  "train.loop": ("train_and_evaluate",),
}
MODULES = {name: module for module, names in NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
  """What `MODULES` names, or a method, which needs no line here."""
  if name in MODULES:
    value = getattr(import_module(f"vera_jax.{MODULES[name]}"), name)
  elif name.startswith("_") or name not in _methods():
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  else:
    value = _methods()[name]
  globals()[name] = value
  return value


def _methods() -> Any:
  return import_module("vera_jax.adapters.table").METHODS


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__, *_methods()})


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
