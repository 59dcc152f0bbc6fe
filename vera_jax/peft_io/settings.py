"""PEFT's adapter_config.json: what it says, and what can't be carried over.

The fields are those of PEFT 0.21.2, read without importing it (that would need
torch). A field that isn't known here may change what the adapter computes: it
must be empty.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.patterns import find
from vera_jax.peft_io.base import TASK_TYPES
from vera_jax.peft_io.forms import FORMS
from vera_jax.peft_io.forms.form import MERGE

FILE = "adapter_config.json"
EMPTY: tuple[Any, ...] = (None, False, "", "none", [], {})
# Read below, or without effect on what a trained adapter computes. A method's
# own fields are in its form.
KNOWN = {
  "auto_mapping",
  "base_model_name_or_path",
  "ensure_weight_tying",
  "fan_in_fan_out",  # checked against the base
  "exclude_modules",
  "inference_mode",
  "init_weights",
  "layers_pattern",
  "layers_to_transform",
  "megatron_core",
  "modules_to_save",
  "peft_type",
  "peft_version",
  "r",
  "revision",
  "runtime_config",
  "target_modules",
  "task_type",
}
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
    method: ours.
    values: of its settings, but for the targets.
    form: PEFT's form of it, a name in `forms.FORMS`.
    base: the base's name. It is None if the file names none, or a revision.
    targets, exclude: a regular expression over whole names, or endings of them.
    layers, layers_pattern: the numbers that targets are limited to, and the
      names of lists of layers that these count.
    modules_to_save: modules that are trained and stored whole, as the head is.
    saved: whether the random matrices are stored in the file.
    head: the kind of head that it was trained with; None if it doesn't say.
    fan_in_fan_out: whether the layers have their kernels as (in, out).
  """

  method: str
  values: Mapping[str, Any]
  form: str
  base: str | None
  targets: str | tuple[str, ...] | None
  exclude: str | tuple[str, ...] = ()
  layers: tuple[int, ...] | None = None
  layers_pattern: tuple[str, ...] = ()
  modules_to_save: tuple[str, ...] = ()
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
  name = str(fields.get("peft_type")).lower()
  if name not in FORMS:
    raise UserError(
      f"peft_type is {fields.get('peft_type')!r}; only"
      f" {', '.join(FORMS).upper()} can be carried."
    )
  form = FORMS[name]

  # What changes the result and has no counterpart here is refused.
  for field, value in fields.items():
    if field not in KNOWN | form.fields and value not in EMPTY:
      raise UserError(f"{field}={value!r}: {ADVICE.get(field, MERGE)}.")
  task_type = fields.get("task_type")
  if task_type not in (None, *TASK_TYPES):
    raise UserError(
      f"task_type={task_type!r}: only {' and '.join(TASK_TYPES)} here."
    )
  method, values = form.settings(dict(fields))

  def names(field: str) -> tuple[str, ...]:
    value = fields.get(field) or ()
    listed = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(name, str) for name in listed):
      raise UserError(f"{field}={value!r}: names of modules are needed.")
    return listed

  def pattern(field: str) -> str | tuple[str, ...] | None:
    value = fields.get(field)
    return value if value is None or isinstance(value, str) else names(field)

  layers = fields.get("layers_to_transform")
  layers = [layers] if isinstance(layers, int) else layers
  base = fields.get("base_model_name_or_path")
  return PeftSettings(
    method=method,
    values=values,
    form=name,
    head=TASK_TYPES.get(str(task_type)),
    fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
    base=str(base) if base and fields.get("revision") is None else None,
    targets=pattern("target_modules"),
    exclude=pattern("exclude_modules") or (),
    layers=tuple(layers) if layers else None,
    layers_pattern=names("layers_pattern"),
    modules_to_save=names("modules_to_save"),
    saved=bool(fields.get("save_projection", "save_projection" in form.fields)),
  )


def is_target(settings: PeftSettings, name: str) -> bool | None:
  """Whether PEFT would adapt the module. If the file doesn't say, it is None.

  Args:
    settings: the adapter's.
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
    saved = "|".join(settings.modules_to_save)
    if saved and find(saved, name, within=r"(?:.*\.)?(?:{})(?:\Z|\.)"):
      return False
    if listed(settings.exclude) or not listed(targets or ()):
      return False
    if settings.layers is None or isinstance(targets, str) or name in targets:
      return True  # a whole name is taken whatever its layer's number
    stack = "|".join(settings.layers_pattern) or r"[^.]*"
    match = find(stack, name, within=r"(?:.*?\.)?(?:{})\.(?P<layer>\d+)\.")
    return match is not None and int(match["layer"]) in settings.layers
  except UserError as error:
    raise UserError(f"{FILE}: {error}") from error
