"""The linear layers of a base, under Hugging Face's names and under ours."""

import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vera_jax.adapters.apply import find_targets
from vera_jax.adapters.interface import Path, Target
from vera_jax.models.bert import BertClassifier, BertConfig
from vera_jax.models.hf_weights import module_name

IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


class Layer(NamedTuple):
  """A linear layer: its path in a looped tree, the same with `layer` for each
  numbered layer, and its widths."""

  path: Path
  kind: Path
  target: Target


@cache
def linear_layers(config: BertConfig) -> dict[str, Layer]:
  """Every linear layer by its name in Hugging Face's classifier."""
  found = {}
  model = BertClassifier(config, 2, scan=False)
  for path, target in find_targets(model, [".*"], IDS).items():
    kind = tuple(re.sub(r"^layer_\d+$", "layer", word) for word in path)
    name = module_name(path, model_type=config.model_type)
    found[name] = Layer(path, kind, target)
  return found


@cache
def param_shapes(config: BertConfig, num_labels: int) -> dict[Path, Any]:
  """The shapes of a classifier's own parameters, by path."""
  model = BertClassifier(config, num_labels)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
  return flatten_dict(shapes["params"])


def patterns(kinds: Collection[Path], there: Collection[Path]) -> list[str]:
  """The shortest of our target patterns for each kind of layer.

  Args:
    kinds: what is adapted.
    there: all that the model has; a pattern matches one of these only.
  """
  return [_pattern(kind, there) for kind in sorted(set(kinds))]


def _pattern(kind: Path, there: Collection[Path]) -> str:
  names = {"/".join(other) for other in there if other != kind}
  for start in range(len(kind) - 1, -1, -1):
    ending = "/".join(kind[start:])
    if not any(f"/{name}".endswith(f"/{ending}") for name in names):
      break
  return re.sub(r"\blayer\b", r"layer(_\\d+)?", ending)


def module_list(names: Collection[str], layers: Mapping[str, Layer]) -> list:
  """PEFT's target_modules for these layers: endings, or else whole names."""
  listed: set[str] = set()
  for name in names:
    kind, words = layers[name].kind, name.split(".")
    same = {n for n in layers if layers[n].kind == kind}
    endings = [".".join(words[i:]) for i in range(len(words) - 1, 0, -1)]
    fit = (
      e for e in endings if {n for n in layers if n.endswith(f".{e}")} == same
    )
    listed.add(next(fit, name) if same <= set(names) else name)
  return sorted(listed)
