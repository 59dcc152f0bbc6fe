"""A grid of scored images with what several runs answer, for looking at."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.adapters.files import load_adapter
from vera_jax.data.images import decode_all
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.report.frame import method_title
from vera_jax.serve.image_predictor import ImagePredictor
from vera_jax.serve.predictor import Answer
from vera_jax.tasks.images import NAMES, select_images

RIGHT, WRONG = "#1b7837", "#b2182b"  # two that the colour-blind can distinguish
WIDE = 6  # images in a row


def picture_grid(
  folders: list[Path], *, count: int = 24, seed: int = 0
) -> Figure:
  """Some scored images; below each its class and the answer of each run.

  Args:
    folders: of finished runs on the same images, such as the head alone and
      VeRA.
    count: how many images are shown.
    seed: decides which ones.

  Raises:
    UserError: a folder holds no result, or the runs have not the same images.
  """
  runs: dict[Path, dict[str, Any]] = {}
  for folder in folders:
    if (result := results.read(folder)) is None:
      raise UserError(f"No result of a run is in {folder}.")
    runs[folder] = result
  first, *others = runs.values()
  if any(run["data"].get("dev") != first["data"].get("dev") for run in others):
    raise UserError("The runs were not scored on the same images.")
  config = ConfigDict(first["config"])
  if config.task not in NAMES:
    raise UserError(f"The runs are of the task {config.task}, not of images.")
  _, classes, splits, _ = select_images(config.data)
  files, numbers = splits["dev"]
  drawn = np.random.default_rng(seed).permutation(numbers)
  chosen = np.sort(drawn[:count])
  encoded = list(files.read(chosen))

  answers: dict[str, list[Answer]] = {}
  good: list[int] = []
  for folder, result in runs.items():
    predictor = ImagePredictor(
      restore_adapter(load_adapter(folder / "adapter"))
    )
    made = decode_all(encoded, predictor.processor)
    good = [i for i, x in enumerate(made) if not isinstance(x, Exception)]
    title = f"{method_title(result['method'])}, seed {result['seed']}"
    answers[title] = predictor.answers([encoded[i] for i in good])
  truth = [classes[files.labels[chosen[i]]] for i in good]
  shown = decode_all([encoded[i] for i in good], predictor.processor)
  return draw_grid(list(shown), truth, answers)


def draw_grid(
  images: list[Any], truth: list[str], answers: Mapping[str, list[Answer]]
) -> Figure:
  """The images in rows; right answers in one colour, wrong ones in another."""
  rows = -(-len(images) // WIDE)
  tall = 1.6 + 0.22 * len(answers)
  figure = Figure(figsize=(1.7 * WIDE, tall * rows + 0.5), dpi=120)
  cells = figure.subplots(rows, WIDE, squeeze=False)
  for cell in cells.flat:
    cell.axis("off")
  for number, (image, name) in enumerate(zip(images, truth, strict=True)):
    cell = cells.flat[number]
    cell.imshow(image)
    cell.set_title(name, fontsize=9)
    for line, answer in enumerate(run[number] for run in answers.values()):
      cell.text(
        0.5,
        -0.1 - 0.16 * line,
        f"{answer.label} {100 * answer.score:.0f} %",
        color=RIGHT if answer.label == name else WRONG,
        fontsize=8,
        ha="center",
        va="center",
        transform=cell.transAxes,
      )
  shares = {
    title: np.mean([a.label == t for a, t in zip(run, truth, strict=True)])
    for title, run in answers.items()
  }
  lines = [
    f"{title}: {share:.0%} of these right" for title, share in shares.items()
  ]
  figure.suptitle(
    "Below each image, from above: " + "; ".join(lines), fontsize=9
  )
  figure.subplots_adjust(hspace=0.35 + 0.15 * len(answers), top=0.9)
  return figure
