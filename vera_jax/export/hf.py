"""A trained model as a plain checkpoint in Hugging Face's layout.

The adapter is folded into the base's kernels, so that transformers' torch
classes load the folder with no adapter library. The base stays untouched: its
name and fingerprint go into merge.json, and to unmerge is to use it again.

Before the folder gets its name, its weights are read back and their answers to
probes compared with the adapted model's: a classifier's to sentences, a
decoder's to tokens drawn from its vocabulary, and to drawn pixels where it
reads images.
"""

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vera_jax.adapters.merge import merge
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.files import (
  JSON,
  check_free,
  make_folder,
  open_file,
  write_json,
)
from vera_jax.models.decoder import logits
from vera_jax.models.family import IMAGES
from vera_jax.models.folder import FILES
from vera_jax.models.hf_weights import read_model, to_hf
from vera_jax.models.kinds import KINDS, WORDS
from vera_jax.operations.quantised import CHOICES
from vera_jax.pretrained.classifier import MERGED, Classifier, load_classifier
from vera_jax.serve.predictor import Predictor, check_finite, text_columns

WEIGHTS = "model.safetensors"
# The largest difference of a logit, as a share of the largest one, or of 1.
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
PROBES = (
  "The film is a quiet, funny and deeply felt portrait of a family.",
  "Two hours of noise, and not one line worth hearing.",
  "Nobody at the station knew when the last train would leave.",
  "She asked him whether the letter had been sent.",
  "Prices rose by 3.5 % in May, the bank said on Tuesday.",
  "The more he eats, the thinner gets.",
  "Is it raining in Lisbon?",
  "No.",
)
DRAWN = 8  # further probes, of tokens drawn from the vocabulary
LENGTH = 48  # tokens of a decoder's probes, which are all drawn
Answer = Callable[[Classifier], np.ndarray]  # the logits of all probes


def write_merged(
  classifier: Classifier,
  folder: str | Path,
  *,
  dtype: str = "float32",
  bounds: Mapping[str, float] = BOUNDS,
) -> dict[str, Any]:
  """Write the merged checkpoint, if it answers as the adapted model does.

  Args:
    classifier: from `restore_adapter`, in float32.
    folder: must not be there, or be empty.
    dtype: of the weights, a name in `BOUNDS`.
    bounds: the most that each type's logits may differ, as in `BOUNDS`.

  Returns:
    What merge.json holds, among it "differences" and "bounds": by type, the
    largest difference of a logit that was found and that is allowed.

  Raises:
    UserError: the folder is there already, or a difference is past its bound;
      nothing is written then.
  """
  check_dtype(dtype)
  return make_folder(
    check_free(folder),
    lambda new: _write(classifier, new, dtype=dtype, bounds=bounds),
  )


def check_dtype(dtype: str) -> None:
  """Refuses what merged weights are not written in.

  Raises:
    UserError: says why they are not quantised again.
  """
  if dtype in BOUNDS:
    return
  why = ""
  if dtype in CHOICES[1:]:
    why = (
      " Merged weights are not quantised again, also where the base was: an"
      " adapter changes weights by less than the steps between codes, so"
      " rounding them would undo most of what was learned (docs/gguf.md). Or"
      " keep the adapter beside its base, which costs nothing."
    )
  raise UserError(f"dtype is {dtype!r}; choose from {', '.join(BOUNDS)}.{why}")


def merged_params(classifier: Classifier) -> dict[str, Any]:
  """The plain model's parameters, with the adapter folded in."""
  return merge(
    classifier.params,
    classifier.projections,
    adapter=classifier.adapter,
    targets=classifier.targets,
  )


def _write(
  classifier: Classifier,
  folder: Path,
  *,
  dtype: str,
  bounds: Mapping[str, float],
) -> dict[str, Any]:
  tensors = to_hf(merged_params(classifier), classifier.config)
  wrong = [name for name, x in tensors.items() if not np.isfinite(x).all()]
  if wrong:
    raise UserError(
      f"The merged {', '.join(wrong[:3])} would hold values that are not finite"
      " numbers: the adapter's or the base's are too large. Nothing was"
      " written."
    )
  for pattern in FILES:
    for file in sorted(classifier.folder.glob(pattern)):
      if file.name != "config.json" and "safetensors" not in file.name:
        with (
          open_file(file, inside=classifier.folder, limit=JSON) as opened,
          (folder / file.name).open("wb") as copy,
        ):
          shutil.copyfileobj(opened, copy)
  write_json(folder / "config.json", _hf_config(classifier, dtype))
  if classifier.kind == WORDS:
    count, answer = _tokens(classifier)
  elif classifier.family.reads == IMAGES:
    count, answer = _pixels(classifier)
  else:
    count, answer = _sentences(classifier)
  expected = check_finite(answer(classifier))
  scale = max(1.0, float(np.abs(expected).max()))
  differences, allowed = {}, {}
  # float32 always, as the proof of the merge; the type to keep comes last
  for kind in dict.fromkeys(("float32", dtype)):
    with np.errstate(over="ignore"):  # infinite weights fail the probes
      cast = {name: x.astype(jnp.dtype(kind)) for name, x in tensors.items()}
    save_file(cast, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / WEIGHTS)
    written = load_classifier(folder, dtype=jnp.dtype(kind))
    with np.errstate(invalid="ignore"):  # of two infinite logits: NaN
      gaps = np.abs(answer(written) - expected)
    difference = float(gaps.max())
    differences[kind], allowed[kind] = difference, scale * bounds[kind]
    if not difference <= allowed[kind]:  # NaN is refused too
      raise UserError(
        f"The merged model in {kind} answers differently from the adapted one:"
        f" a logit differs by {difference:.2e}, past the bound"
        f" {allowed[kind]:.2e}. Nothing was written."
      )
  about = {
    **classifier.about,
    "dtype": dtype,
    "probes": count,
    "differences": differences,
    "bounds": allowed,
  }
  write_json(folder / MERGED, about)
  return about


def _hf_config(classifier: Classifier, dtype: str) -> dict[str, Any]:
  """The base's config.json, with the class and a classifier's labels."""
  fields = read_model(classifier.folder)
  for stale in ("_name_or_path", "torch_dtype", "transformers_version"):
    fields.pop(stale, None)
  labels, kind = classifier.labels or ("LABEL_0",), KINDS[classifier.kind]
  fields["architectures"] = [classifier.family.classes[kind.head]]
  if classifier.kind == WORDS:
    return {**fields, "dtype": dtype}
  return {
    **fields,
    "id2label": {str(i): label for i, label in enumerate(labels)},
    "label2id": {label: i for i, label in enumerate(labels)},
    "num_labels": len(labels),
    "problem_type": kind.problem_type,
    "dtype": dtype,
  }


def _sentences(classifier: Classifier) -> tuple[int, Answer]:
  """Sentences, nonsense from the tokenizer's own vocabulary, the longest."""
  vocabulary = sorted(load_tokenizer(classifier.folder).get_vocab())
  rng = random.Random(0)
  drawn = [" ".join(rng.choices(vocabulary, k=4 + 3 * i)) for i in range(DRAWN)]
  first = [*PROBES, *drawn]
  columns = text_columns(classifier)
  pairs = bool(columns) and len(columns[0]) > 1
  second = [*first[1:], first[0]] if pairs else None
  longest = classifier.max_length
  return len(first), lambda model: Predictor(
    model, max_length=longest
  ).any_logits(first, second)


def _tokens(classifier: Classifier) -> tuple[int, Answer]:
  """Rows of tokens, as long as the room allows, and the word after each."""
  length = min(LENGTH, classifier.room)
  rng = np.random.default_rng(0)
  drawn = rng.integers(classifier.config.vocab_size, size=(DRAWN, length))
  ids, last = jnp.asarray(drawn, jnp.int32), jnp.full((DRAWN, 1), length - 1)

  def answer(model: Classifier) -> np.ndarray:
    run = jax.jit(model.module.apply)
    words = run(model.variables, ids, read_positions=last)
    return np.asarray(logits(words))[:, 0]

  return DRAWN, answer


def _pixels(classifier: Classifier) -> tuple[int, Answer]:
  """Drawn pixels, of the size of training or else the checkpoint's."""
  side = classifier.about.get("image_size") or classifier.config.image_size
  shape = (DRAWN, side, side, classifier.config.num_channels)
  pixels = np.random.default_rng(0).standard_normal(shape, np.float32)

  def answer(model: Classifier) -> np.ndarray:
    return np.asarray(jax.jit(model.module.apply)(model.variables, pixels))[
      :, 0
    ]

  return DRAWN, answer
