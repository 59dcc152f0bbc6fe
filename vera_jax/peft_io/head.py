"""The head that comes with a PEFT adapter, whole (modules_to_save)."""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.interface import Path as TreePath
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.models.bert import BertConfig
from vera_jax.models.hf_weights import load_params
from vera_jax.peft_io.layers import param_shapes

HEADS = ("classifier", "pooler")
Leaves = dict[TreePath, np.ndarray]


def num_labels(head: Leaves) -> int:
  """How many outputs the classifier has."""
  for path, leaf in head.items():
    if path in (("classifier", "kernel"), ("classifier", "out_proj", "kernel")):
      return leaf.shape[-1]
  raise UserError("The adapter's file has only part of a classifier.")


def check_head(head: Leaves, config: BertConfig) -> dict[TreePath, Any]:
  """Compare with the model's own; returns the shapes of all its parameters."""
  shapes = param_shapes(config, num_labels(head))
  parts = {path[0] for path in head}
  for path in sorted({*head, *(p for p in shapes if p[0] in parts)}):
    need = shapes[path].shape if path in shapes else None
    have = head[path].shape if path in head else None
    if need != have:
      raise UserError(
        f"The head's {'/'.join(path)} has shape {have} in the adapter and"
        f" {need} in the base's model. Is it the right base?"
      )
  return shapes


def head_of_base(folder: Path, config: BertConfig) -> Leaves:
  """The adapter brings no head: it was trained with the base's own."""
  labels = read_json(folder / "config.json").get("id2label") or [0, 1]
  shapes = param_shapes(config, len(labels))
  own = {p: x for p, x in shapes.items() if p[0] == "classifier"}
  loaded = load_params(folder, unflatten_dict(own))
  if loaded.missing:
    raise UserError(
      f"Neither the adapter (modules_to_save) nor {folder} has a classifier."
      " Save the adapter with its head: task_type='SEQ_CLS'."
    )
  leaves = flatten_dict(loaded.params)
  return {path: np.asarray(leaf) for path, leaf in leaves.items()}
