"""PEFT's adapter_config.json: what it says, and what can't be carried over.

The fields are those of PEFT 0.21.2, read without importing it (that would need
torch). A field that isn't known here may change what the adapter computes: it
must be empty.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.adapters.methods import LARGEST
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.patterns import find

FILE = "adapter_config.json"
# PEFT's task_type -> the kind of head, as `Family.classes` has it.
TASK_TYPES = {"SEQ_CLS": "classification", "CAUSAL_LM": "language_modelling"}
METHODS = {"VERA": "vera", "LORA": "lora", "IA3": "ia3"}
EMPTY: tuple[Any, ...] = (None, False, "", "none", [], {})
# Read below, or without effect on what a trained adapter computes.
KNOWN = {
  "alpha_pattern",
  "auto_mapping",
  "base_model_name_or_path",
  "d_initial",
  "ensure_weight_tying",
  "fan_in_fan_out",  # checked against the base
  "exclude_modules",
  "feedforward_modules",  # the shapes in the file say it
  "inference_mode",
  "init_ia3_weights",
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
# These initialisations leave the base's own weights as they are.
INITS = (True, False, "gaussian", "eva", "orthogonal")
MERGE = (
  "train it again without, or merge it in PEFT (merge_and_unload, then"
  " save_pretrained) and take the result as a base"
)
ADVICE = {
  "bias": f"biases of the base were trained too; {MERGE}",
  "use_dora": "it is known for LoRA alone",
  "lora_bias": f"LoRA's B has a bias here that no adapter of ours has; {MERGE}",
  "loftq_config": f"the base was quantised; {MERGE}",
  "use_qalora": f"the base was quantised; {MERGE}",
}


class PeftSettings(NamedTuple):
  """What an adapter_config.json says, in our terms.

  Attributes:
    method: "vera", "lora", "dora" (LoRA with use_dora) or "ia3".
    rank: r; 0 where the method has none.
    base: the base's name; None where there is none, or a revision of one.
    targets, exclude: a regular expression over whole names, or endings of them.
    layers, layers_pattern: the numbers that targets are limited to, and the
      names of lists of layers that these count.
    modules_to_save: modules that are trained and stored whole, as the head is.
    alpha: LoRA's, such that its scale is alpha / rank: rank-stabilised LoRA,
      whose scale is alpha / sqrt(rank), has it times sqrt(rank).
    d_init: the first value of VeRA's d.
    key: the seed of PEFT's A and B.
    saved: whether A and B are stored in the file.
    head: the kind of head that it was trained with; None if it doesn't say.
    fan_in_fan_out: whether the layers have their kernels as (in, out).
  """

  method: str
  rank: int
  base: str | None
  targets: str | tuple[str, ...] | None
  exclude: str | tuple[str, ...] = ()
  layers: tuple[int, ...] | None = None
  layers_pattern: tuple[str, ...] = ()
  modules_to_save: tuple[str, ...] = ()
  alpha: float = 0.0
  d_init: float = 0.1
  key: int = 0
  saved: bool = False
  head: str | None = None
  fan_in_fan_out: bool = False


def read_settings(folder: Path) -> PeftSettings:
  """Read and check a folder's adapter_config.json.

  Raises:
    UserError: naming the field that can't be carried over or has a wrong value.
  """
  file = folder / FILE
  fields = read_json(file)
  try:
    return _settings(fields)
  except (TypeError, ValueError, AttributeError, OverflowError) as error:
    raise UserError(f"{file} has an unusable value: {error}") from error
  except UserError as error:
    raise UserError(f"{file}: {error}") from error


def _settings(fields: Mapping[str, Any]) -> PeftSettings:
  method = METHODS.get(str(fields.get("peft_type")))
  if method is None:
    raise UserError(
      f"peft_type is {fields.get('peft_type')!r}; only {' and '.join(METHODS)}"
      " can be carried."
    )

  own = set()
  if method == "lora" and fields.get("use_dora"):
    method, own = "dora", {"use_dora"}

  # What changes the result and has no counterpart here is refused.
  for name, value in fields.items():
    if name not in KNOWN | own and value not in EMPTY:
      raise UserError(f"{name}={value!r}: {ADVICE.get(name, MERGE)}.")
  task_type = fields.get("task_type")
  if task_type not in (None, *TASK_TYPES):
    raise UserError(
      f"task_type={task_type!r}: only {' and '.join(TASK_TYPES)} here."
    )
  if fields.get("init_lora_weights", True) not in INITS:
    raise UserError(
      f"init_lora_weights={fields['init_lora_weights']!r}: it changed the"
      " base's weights. Convert the adapter in PEFT (save_pretrained's"
      " path_initial_model_for_weight_conversion) first."
    )
  if method in ("lora", "dora"):
    for name, whole in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
      values = (fields.get(name) or {}).values()
      if any(value != fields.get(whole, 8) for value in values):
        raise UserError(
          f"{name}={fields[name]!r}: all layers share one value here; {MERGE}."
        )

  def names(field: str) -> tuple[str, ...]:
    value = fields.get(field) or ()
    return (value,) if isinstance(value, str) else tuple(value)

  def pattern(field: str) -> str | tuple[str, ...] | None:
    value = fields.get(field)
    return value if value is None or isinstance(value, str) else tuple(value)

  def number(field: str, default: float) -> float:
    value = float(fields.get(field, default))
    if not abs(value) <= LARGEST:  # which NaN is not
      raise UserError(f"{field}={value}: a usual, finite number is needed.")
    return value

  rank = fields.get("r", 256 if method == "vera" else 8)  # PEFT's defaults
  if method == "ia3":
    rank = 0
  elif not isinstance(rank, int) or not 1 <= rank <= LARGEST:
    raise UserError(f"r={rank!r}: it must be a whole number, at least 1.")
  layers = fields.get("layers_to_transform")
  layers = [layers] if isinstance(layers, int) else layers
  base = fields.get("base_model_name_or_path")
  common = PeftSettings(
    method=method,
    rank=rank,
    head=TASK_TYPES.get(str(task_type)),
    fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
    base=str(base) if base and fields.get("revision") is None else None,
    targets=pattern("target_modules"),
    exclude=pattern("exclude_modules") or (),
    layers=tuple(layers) if layers else None,
    layers_pattern=names("layers_pattern"),
    modules_to_save=names("modules_to_save"),
  )
  if method == "vera":
    return common._replace(
      d_init=number("d_initial", 0.1),
      key=int(fields.get("projection_prng_key") or 0) % 2**32,  # as torch does
      saved=bool(fields.get("save_projection", True)),
    )
  if method == "ia3":
    return common
  root = math.sqrt(rank) if fields.get("use_rslora") else 1.0
  return common._replace(alpha=number("lora_alpha", 8) * root)


def is_target(settings: PeftSettings, name: str) -> bool | None:
  """Whether PEFT would adapt the module; None where the file doesn't say.

  Args:
    settings: of the adapter.
    name: of a linear module, in Hugging Face's classifier.

  Raises:
    UserError: the file holds no proper regular expression.
  """
  targets = settings.targets
  if targets in (None, "all-linear"):
    return None

  def listed(entries: str | tuple[str, ...]) -> bool:
    if isinstance(entries, str):
      return bool(find(entries, name))
    return any(name == e or name.endswith(f".{e}") for e in entries)

  try:
    whole = "|".join(settings.modules_to_save)
    if whole and find(whole, name, form=r"(?:.*\.)?(?:{})(?:\Z|\.)"):
      return False
    if listed(settings.exclude) or not listed(targets or ()):
      return False
    if settings.layers is None or isinstance(targets, str) or name in targets:
      return True  # a whole name is taken whatever its layer's number
    stack = "|".join(settings.layers_pattern) or r"[^.]*"
    found = find(stack, name, form=r"(?:.*?\.)?(?:{})\.(?P<layer>\d+)\.")
    return found is not None and int(found["layer"]) in settings.layers
  except UserError as error:
    raise UserError(f"{FILE}: {error}") from error
