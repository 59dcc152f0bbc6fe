"""PEFT's adapter_config.json: what it says, and what can't be carried.

Read from PEFT 0.21.2 without importing it (that would need torch). A field that
isn't known here may change what the adapter computes: it must be empty.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.errors import UserError
from vera_jax.files import read_json

FILE = "adapter_config.json"
METHODS = {"VERA": "vera", "LORA": "lora"}
EMPTY: tuple[Any, ...] = (None, False, "", "none", [], {})
# Read below, or without effect on what a trained adapter computes.
KNOWN = {
  "alpha_pattern",
  "auto_mapping",
  "base_model_name_or_path",
  "d_initial",
  "ensure_weight_tying",
  "exclude_modules",
  "inference_mode",
  "init_lora_weights",
  "init_weights",
  "layers_pattern",
  "layers_to_transform",
  "lora_alpha",
  "lora_dropout",
  "megatron_core",
  "modules_to_save",
  "peft_type",
  "peft_version",
  "projection_prng_key",
  "qalora_group_size",
  "r",
  "rank_pattern",
  "revision",
  "runtime_config",
  "save_projection",
  "target_modules",
  "task_type",
  "use_rslora",
  "vera_dropout",
}
# These ways of starting leave the base's own weights as they are.
INITS = (True, False, "gaussian", "eva", "orthogonal")
MERGE = (
  "train it again without, or merge it in PEFT (merge_and_unload, then"
  " save_pretrained) and take the result as a base"
)
ADVICE = {
  "bias": f"biases of the base were trained too; {MERGE}",
  "fan_in_fan_out": "the layers are Linear, where PEFT itself turns it off;"
  f" set it to false in {FILE}",
  "use_dora": f"DoRA changes the whole weight's length; {MERGE}",
  "lora_bias": f"LoRA's B has a bias here that no adapter of ours has; {MERGE}",
  "loftq_config": f"the base was quantised; {MERGE}",
  "use_qalora": f"the base was quantised; {MERGE}",
}


class PeftSettings(NamedTuple):
  """An adapter_config.json in our terms; `alpha` is such that the scale is
  alpha / rank, whether or not PEFT's was stabilised by the rank's root."""

  method: str
  rank: int
  base: str | None
  targets: str | tuple[str, ...] | None
  exclude: str | tuple[str, ...]
  layers: tuple[int, ...] | None
  layers_pattern: tuple[str, ...]
  modules_to_save: tuple[str, ...]
  alpha: float = 0.0
  d_init: float = 0.1
  key: int = 0
  saved: bool = False


def read_config(folder: Path) -> PeftSettings:
  """Read and check; a UserError names the field that can't be honoured."""
  fields = read_json(folder / FILE)
  method = METHODS.get(str(fields.get("peft_type")))
  if method is None:
    raise UserError(
      f"{folder / FILE}: peft_type is {fields.get('peft_type')!r}; only"
      f" {' and '.join(METHODS)} can be carried."
    )
  try:
    _refuse(fields, method)
    return _settings(fields, method)
  except (TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f"{folder / FILE} has an unusable value: {error}"
    ) from error
  except UserError as error:
    raise UserError(f"{folder / FILE}: {error}") from error


def _refuse(fields: Mapping[str, Any], method: str) -> None:
  for name, value in fields.items():
    if name not in KNOWN and value not in EMPTY:
      raise UserError(f"{name}={value!r}: {ADVICE.get(name, MERGE)}.")
  if fields.get("task_type") not in (None, "SEQ_CLS"):
    raise UserError(
      f"task_type={fields['task_type']!r}: only classifiers (SEQ_CLS) here."
    )
  if fields.get("init_lora_weights", True) not in INITS:
    raise UserError(
      f"init_lora_weights={fields['init_lora_weights']!r}: it changed the"
      " base's weights. Convert the adapter in PEFT (save_pretrained's"
      " path_initial_model_for_weight_conversion) first."
    )
  for name, whole in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
    values = (fields.get(name) or {}).values()
    odd = [value for value in values if value != fields.get(whole, 8)]
    if method == "lora" and odd:
      raise UserError(
        f"{name}={fields[name]!r}: all layers share one value here; {MERGE}."
      )


def _settings(fields: Mapping[str, Any], method: str) -> PeftSettings:
  rank = fields["r"] if "r" in fields else (256 if method == "vera" else 8)
  if not isinstance(rank, int) or rank < 1:
    raise UserError(f"r={rank!r}: it must be a whole number, at least 1.")
  layers = fields.get("layers_to_transform")
  layers = [layers] if isinstance(layers, int) else layers
  base = fields.get("base_model_name_or_path")
  common = PeftSettings(
    method=method,
    rank=rank,
    base=str(base) if base and fields.get("revision") is None else None,
    targets=_names(fields.get("target_modules")),
    exclude=_names(fields.get("exclude_modules")) or (),
    layers=tuple(layers) if layers else None,
    layers_pattern=_words(fields.get("layers_pattern")),
    modules_to_save=_words(fields.get("modules_to_save")),
  )
  if method == "vera":
    return common._replace(
      d_init=float(fields.get("d_initial", 0.1)),
      key=int(fields.get("projection_prng_key") or 0) % 2**32,  # as torch does
      saved=bool(fields.get("save_projection", True)),
    )
  root = math.sqrt(rank) if fields.get("use_rslora") else 1.0
  return common._replace(alpha=float(fields.get("lora_alpha", 8)) * root)


def _names(value: Any) -> str | tuple[str, ...] | None:
  return value if value is None or isinstance(value, str) else tuple(value)


def _words(value: Any) -> tuple[str, ...]:
  return (value,) if isinstance(value, str) and value else tuple(value or ())


def _listed(name: str, entries: str | Iterable[str]) -> bool:
  """A string is a regular expression; of a list, entries end the name."""
  if isinstance(entries, str):
    return bool(re.fullmatch(entries, name))
  return any(name == e or name.endswith(f".{e}") for e in entries)


def is_target(settings: PeftSettings, name: str) -> bool | None:
  """Whether PEFT would adapt the module; None where the file doesn't say.

  Args:
    settings: of the adapter.
    name: of a linear module, in Hugging Face's classifier.
  """
  if settings.targets in (None, "all-linear"):
    return None
  try:
    return _is_target(settings, name, settings.targets or ())
  except re.error as error:
    raise UserError(
      f"{FILE} has no proper regular expression: {error}."
    ) from error


def _is_target(
  settings: PeftSettings, name: str, targets: str | tuple[str, ...]
) -> bool:
  kept = rf"(?:^|.*\.)(?:{'|'.join(settings.modules_to_save)})(?:$|\..*)"
  if settings.modules_to_save and re.match(kept, name):
    return False
  if _listed(name, settings.exclude) or not _listed(name, targets):
    return False
  if settings.layers is None or isinstance(targets, str) or name in targets:
    return True
  stack = "|".join(settings.layers_pattern) or r"[^.]*"
  found = re.match(rf"(?:^|.*?\.)(?:{stack})\.(\d+)\.", name)
  return found is not None and int(found[1]) in settings.layers
