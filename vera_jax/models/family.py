"""What a model family is, and the table of them.

A family is an architecture as its checkpoints have it: it reads config.json,
makes a plain linen module that knows no adapters, and says how the tensors of
its files are named and how its weights are split over devices. A new family is
one file with a `FAMILY`, and one line in `FAMILIES`.
"""

import dataclasses
import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import flax.linen as nn

from vera_jax.errors import UserError
from vera_jax.files import read_json

log = logging.getLogger(__name__)
TEXTS, IMAGES = "texts", "images"
LABELS = 100_000  # at most, where config.json names none of them
# Kinds of layers in config.json's layer_types: without and with a window.
FULL, SLIDING = "full_attention", "sliding_attention"


class Names(NamedTuple):
  """How a family's files name what the parameter tree has.

  A tree's path is the tensor's name without prefix, "/" for ".", a layer's
  number behind "_" (`encoder/layer_3`), and flax's names of leaves for torch's.
  Every tree has its layers in `encoder/layer...`, whatever the file calls them.

  Attributes:
    prefixes: words that a file may have before a base's names; the first is
      written.
    outside: modules beside the base, whose names have no prefix.
    renamed: old spellings in files and the ones that are used now.
    unused: beginnings of names that no task has a place for, such as buffers
      and pretraining heads.
    new: beginnings of paths that a task may bring itself, such as its head.
    tied: an output layer and the table of words that is one with it, unless
      config.json or the files' own numbers say otherwise; () for none.
    transposed: whether files have kernels as (out, in), as torch's linear layer
      does; trees have (in, out).
    to_file, to_tree: a module's dotted name in a looped tree -> in a file,
      prefix aside, and back, where the two are not the same.
    to_class: a module's name in a file -> in transformers' class, which PEFT
      goes by, where the two are not the same.
  """

  prefixes: tuple[str, ...] = ("",)
  outside: tuple[str, ...] = ("classifier",)
  renamed: tuple[tuple[str, str], ...] = ()
  unused: tuple[str, ...] = ()
  new: tuple[str, ...] = ()
  tied: tuple[str, ...] = ()
  transposed: bool = True
  to_file: Callable[[str], str] = str
  to_tree: Callable[[str], str] = str
  to_class: Callable[[str], str] = str


class Fields(NamedTuple):
  """What is done with each field of a config.json, in three groups.

  A field that is in none of them might change the answers for all we know: it
  is named in a warning.

  Attributes:
    used: what is read.
    unused: what changes no answer: it is about training elsewhere, writing
      texts, other heads, or how other programs compute the same.
    fixed: the values at which a field changes no answer; another is refused.
  """

  used: frozenset[str]
  unused: frozenset[str] = frozenset()
  fixed: Mapping[str, tuple[Any, ...]] = {}

  def take(
    self, fields: Mapping[str, Any], *, inside: str = ""
  ) -> dict[str, Any]:
    """The used fields.

    Args:
      fields: of config.json, or of an object in it.
      inside: that object's name.

    Raises:
      UserError: a fixed field has another value.
    """
    for name, values in self.fixed.items():
      if name in fields:
        one_of(fields, name, values, inside=inside)
    known = self.used | self.unused | self.fixed.keys()
    if unknown := sorted(f"{inside}{n}" for n in fields if n not in known):
      _warn_of(", ".join(unknown))
    return {name: fields[name] for name in fields if name in self.used}


# Networks whose tokens all see each other, and those whose tokens see back.
BOTH_WAYS: dict[str, tuple[Any, ...]] = {
  "add_cross_attention": (False, None),
  "is_causal": (False, None),
  "is_decoder": (False, None),
}
CAUSAL: dict[str, tuple[Any, ...]] = {
  "add_cross_attention": (False, None),
  "is_causal": (True,),
}


def field_table(
  used: str, *, unused: str = "", fixed: Mapping[str, tuple[Any, ...]]
) -> Fields:
  """A family's fields in words, with those that every config.json may have."""
  read_here = frozenset(used.split())
  common = (
    "_attn_implementation _attn_implementation_autoset _name_or_path"
    " _num_labels attn_implementation chunk_size_feed_forward"
    " cross_attention_hidden_size dtype finetuning_task gradient_checkpointing"
    " keys_to_ignore_at_inference label2id name_or_path output_attentions"
    " output_hidden_states output_past return_dict tf_legacy_loss"
    " tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype"
    " torchscript transformers.js_config transformers_version unsloth_fixed"
    " unsloth_version use_bfloat16 use_cache use_return_dict"
  )
  tokens = (
    "bos_token_id cls_token_id decoder_start_token_id eos_token_id"
    " mask_token_id pad_token_id sep_token_id unk_token_id"
  )
  writing = (
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample"
    " early_stopping encoder_no_repeat_ngram_size"
    " exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id"
    " length_penalty max_length max_new_tokens min_length no_repeat_ngram_size"
    " num_beam_groups num_beams num_return_sequences output_scores prefix"
    " remove_invalid_values repetition_penalty return_dict_in_generate"
    " suppress_tokens task_specific_params temperature top_k top_p typical_p"
  )
  # read by `family_of`, `label_names` and `classifier.py`
  read = "architectures id2label model_type num_labels problem_type"
  others = f"{unused} {common} {tokens} {writing}"
  return Fields(
    used=read_here | frozenset(read.split()),
    unused=frozenset(others.split()) - read_here,
    fixed={
      "is_encoder_decoder": (False, None),
      "per_layer_config": (None, {}),
      "pruned_heads": (None, {}),
      "quantization_config": (None, {}),
      **fixed,
    },
  )


@functools.cache  # one warning, however often a config.json is read
def _warn_of(unknown: str) -> None:
  log.warning(
    "config.json has fields that are not known here, and are not looked at: %s."
    " If one of them changes what the network computes, its answers are wrong.",
    unknown,
  )


class Family(NamedTuple):
  """A model family.

  Attributes:
    config: the used fields of config.json -> a dataclass; what the module can't
      honour is a UserError. It has at least `hidden_size`, `num_hidden_layers`,
      `num_attention_heads` and `model_type`; of texts also `vocab_size`.
    fields: what is done with each field.
    module: (config, head, outputs, *, dtype, param_dtype, scan, remat) -> a
      linen module from the arrays of `inputs` to the head's outputs.
    inputs: (rows, length, slots) -> the shapes of the module's keyword inputs,
      which a batch has under the same names. The length is in tokens; of images
      it is the pixels of a side.
    names: of the tensors in its files.
    rules: (pattern over a leaf's path, mesh axes of its last axes), first match
      wins; other leaves lie on every device.
    room: config -> the most tokens that a text may have; images are resized.
    classes: transformers' class for each kind of head that the module has:
      "classification" gives outputs [rows, slots, outputs], one for each
      example; "token_classification" [rows, length, outputs], one for each
      token; "language_modelling" `decoder.Words`, for each read position.
    head: pattern of the paths of the head, which every method trains; None for
      "classifier/.*", if there are such.
    output: pattern of the paths of a pretrained output layer, which the method
      "head" trains and others leave as it is; "" where tasks bring a head.
    fixed: pattern of the paths of leaves that no method trains, such as running
      statistics; "" for none.
    stacks: whether its layers are alike, so that they may be stacked.
    own: whether the architecture is this package's alone, so that transformers
      and PEFT have no class for it.
    fused: config -> the parts of fused kernels, which targets may name: by a
      layer's pattern, each part's first and last column by name.
    reads: what the inputs are, `TEXTS` or `IMAGES`.
    processor: how the name of its images' preparation begins in a
      preprocessor_config.json, for a folder that names none.
    example: the sizes, as `inputs` takes them, that shapes are traced with.
  """

  config: Callable[[Mapping[str, Any]], Any]
  fields: Fields
  module: Callable[..., nn.Module]
  inputs: Callable[[int, int, int], dict[str, Any]]
  names: Names
  rules: tuple[tuple[str, tuple[str | None, ...]], ...]
  room: Callable[[Any], int]
  classes: Mapping[str, str]
  head: str | None = None
  output: str = ""
  fixed: str = ""
  stacks: bool = True
  own: bool = False
  fused: Callable[[Any], Mapping[str, Mapping[str, tuple[int, int]]]] = (
    lambda config: {}
  )
  reads: str = TEXTS
  processor: str = "ViT"
  example: tuple[int, int, int] = (1, 8, 1)


# config.json's model_type -> the module of this package that has its FAMILY.
FAMILIES = {
  "bert": "bert",
  "roberta": "bert",
  "xlm-roberta": "bert",
  "camembert": "bert",
  "distilbert": "distilbert",
  "modernbert": "modernbert",
  "gpt2": "gpt2",
  "llama": "llama",
  "mistral": "llama",
  "ministral": "llama",
  "qwen2": "llama",
  "qwen3": "llama",
  "gemma3_text": "gemma3",
  "vit": "vit",
  "dinov2": "dinov2",
  "efficientnet_lite": "other_networks.efficientnet",
  "char_lstm": "other_networks.char_lstm",
}

# The model_type of networks that read more than texts: that of their text part,
# and the fields of config.json that are of the other parts.
TEXT_PARTS = {
  "gemma3": (
    "gemma3_text",
    "architectures boi_token_index eoi_token_index image_token_index"
    " mm_tokens_per_image text_config vision_config",
  )
}


def family_of(fields: Mapping[str, Any]) -> Family:
  """The family that a config.json names.

  Raises:
    UserError: there is no such family here.
  """
  kind = fields.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise UserError(
      f"config.json: model_type is {kind!r}; this package has"
      f" {', '.join(map(repr, FAMILIES))}."
    )
  module = importlib.import_module(f"vera_jax.models.{FAMILIES[kind]}")
  return module.FAMILY[kind]


def read_fields(folder: Path) -> dict[str, Any]:
  """A folder's config.json; of a network that reads more than texts, those of
  its text part as a config.json of its own."""
  hint = "config.model.name takes a folder in Hugging Face's layout."
  fields = read_json(folder / "config.json", hint=hint)
  if (kind := str(fields.get("model_type"))) not in TEXT_PARTS:
    return fields
  part, others = TEXT_PARTS[kind]
  inner = fields.get("text_config")
  if not isinstance(inner, dict):
    raise UserError(f"{folder}/config.json: a {kind} without a text_config.")
  outer = {k: v for k, v in fields.items() if k not in others.split()}
  return {**outer, "model_type": part, **inner}


def label_names(fields: Mapping[str, Any]) -> list[str]:
  """The labels of a config.json in the order of the logits, which is by id.

  Without names they are LABEL_0, LABEL_1 and so on, as transformers has them.

  Raises:
    UserError: ids that are no numbers.
  """
  try:
    count = int(fields.get("num_labels", 2))
    if count > LABELS and not fields.get("id2label"):
      raise ValueError
    names = fields.get("id2label") or {i: f"LABEL_{i}" for i in range(count)}
    ordered = sorted((int(key), str(value)) for key, value in names.items())
  except (AttributeError, TypeError, ValueError, OverflowError) as error:
    raise UserError("config.json: no usable id2label or num_labels.") from error
  return [name for _, name in ordered]


def config_of(fields: Mapping[str, Any]) -> Any:
  """The fields of a config.json as its family's dataclass.

  Raises:
    UserError: there is no such family here, or it can't honour a field.
  """
  family = family_of(fields)
  try:
    return family.config(family.fields.take(fields))
  except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
    raise UserError(f"config.json has an unusable value: {error}.") from error


def load_config(folder: Path) -> Any:
  """A folder's config.json as its family's dataclass."""
  return config_of(read_fields(folder))


def one_of(
  fields: Mapping[str, Any],
  name: str,
  allowed: Iterable[Any],
  *,
  inside: str = "",
) -> Any:
  """A field of config.json, if it is among the values that a module knows."""
  value, known = fields.get(name), tuple(allowed)
  if value not in known:
    words = ", ".join(repr(word) for word in known if word not in (None, {}))
    raise UserError(
      f"config.json: {inside}{name} is {value!r}; this model supports"
      f" {words or 'none'}."
    )
  return value


def positive(
  fields: Mapping[str, Any], name: str, *, inside: str = ""
) -> float:
  """A number above zero; raises a UserError where it is something else."""
  value = fields.get(name)
  if not isinstance(value, int | float) or not 0 < value < math.inf:
    raise UserError(
      f"config.json: {inside}{name} is {value!r}; it is a number above 0."
    )
  return float(value)


def renamed(
  fields: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
  """The fields by the names that all families' configs have.

  Args:
    fields: of config.json.
    names: a family's own names, and the common ones.

  Raises:
    UserError: a field has both names, and two values.
  """
  known = {k: value for k, value in fields.items() if k not in names}
  for word, common in names.items():
    if word not in fields:
      continue
    if fields.get(common, fields[word]) != fields[word]:
      raise UserError(
        f"config.json: {word} is {fields[word]!r} and {common} is"
        f" {fields[common]!r}, which are two names for one thing; keep one."
      )
    known[common] = fields[word]
  return known


def sliding_layers(
  fields: Mapping[str, Any], layers: int
) -> tuple[bool, ...] | None:
  """Whether a layer has a sliding window, of each, by `layer_types`.

  Returns:
    None where config.json has no such list.

  Raises:
    UserError: a kind of layer that isn't known, or another number of layers.
  """
  types, kinds = fields.get("layer_types"), (FULL, SLIDING)
  if types is None:
    return None
  if not isinstance(types, list | tuple) or len(types) != layers:
    raise UserError(
      f"config.json: layer_types is {types!r}, and no list of {layers} layers."
    )
  for kind in types:
    one_of({"layer_types": kind}, "layer_types", kinds, inside="one of ")
  return tuple(kind == SLIDING for kind in types)


def take_fields(cls: type, fields: Mapping[str, Any]) -> Any:
  """A config dataclass from the fields of the same names.

  Raises:
    UserError: one is missing, of a wrong type, or too small or large; or heads
      don't divide.
  """
  hints = get_type_hints(cls)
  taken = {name: fields[name] for name in hints if name in fields}
  wrong = [
    field.name
    for field in dataclasses.fields(cls)
    if not isinstance(
      taken.get(field.name, field.default), hints[field.name] | int
    )
  ]
  if wrong:
    raise UserError(f"config.json has no usable {', '.join(wrong)}.")
  config = cls(**taken)
  small = [
    f"{name} {getattr(config, name)}"
    for name, hint in hints.items()
    if hint is int and getattr(config, name) < (name != "pad_token_id")
  ]
  if small:
    raise UserError(f"config.json has {', '.join(small)}, which is too small.")
  large = [
    f"{name} {value}"
    for name in hints
    if isinstance(value := getattr(config, name), int) and value >= 2**31
  ]
  if large:  # they meet the ids and positions of a batch, which are int32
    raise UserError(f"config.json has {', '.join(large)}, which is too large.")
  width, rest = divmod(config.hidden_size, config.num_attention_heads)
  if rest:
    raise UserError(
      f"config.json: hidden_size {config.hidden_size} does not divide into "
      f"num_attention_heads {config.num_attention_heads}."
    )
  if fields.get("head_dim") not in (None, getattr(config, "head_dim", width)):
    raise UserError(
      f"config.json: heads of width {fields['head_dim']} (head_dim); this"
      f" model supports hidden_size / num_attention_heads, which is {width}."
    )
  return config
