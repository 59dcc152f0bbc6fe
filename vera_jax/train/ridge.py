"""A baseline without training: ridge regression on the frozen base's features.

What the head would read is computed once for each image; a linear classifier of
it has a closed form, so nothing has a learning rate. Big Vision scores features
from a few examples in the same way. The penalty is chosen by leave-one-out
error on the training images, never on those that are scored.
"""

import copy
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.adapters.labels import join
from vera_jax.errors import UserError, install
from vera_jax.places import place
from vera_jax.tasks.metrics import accuracy
from vera_jax.train.config import check_settings
from vera_jax.train.runtime import prepare
from vera_jax.train.setup import Setup, build_setup
from vera_jax.train.workdir import check_workdir, lock_workdir, write_config

METHOD = "ridge"
PENALTIES = np.logspace(-2, 6, 17)


def ridge(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Score ridge regression on the features of a run's images.

  Args:
    config: a run's; its method and its rates have no meaning here.
    workdir: gets a config.json and a result.json, as a run's has them.

  Returns:
    The contents of result.json.

  Raises:
    UserError: for whatever the user can mend, such as a task without classes
      of images.
  """
  try:
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
  except ImportError as error:
    why = f"Ridge regression needs scikit-learn: {install('images')}"
    raise UserError(why) from error
  config = copy.deepcopy(config)
  config.method = "head"  # nothing is adapted
  check_settings(config)
  folder = place(workdir)
  written = {**config.to_dict(), "method": METHOD}
  check_workdir(folder, written)
  if (result := results.read(folder)) is not None:
    return result
  began = time.monotonic()
  prepare()
  setup = build_setup(config)
  if "pixel_values" not in setup.model.blueprint.inputs:
    raise UserError(f"{setup.task.name} has no images; ridge is for these.")
  model = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
  model.fit(features(setup, "train"), setup.data.labels("train"))
  predicted = model.predict(features(setup, "dev"))
  score = accuracy(predicted, setup.data.labels("dev"))
  epoch = {
    "epoch": config.optim.epochs,
    "step": setup.steps,
    "score": score,
    "metrics": {"accuracy": score},
    "collapsed": False,
  }
  counts = setup.model.counts
  result = {
    "task": setup.task.name,
    "method": METHOD,
    "seed": config.seed,
    "base": config.model.name,
    "labels": list(setup.task.labels),
    "kind": setup.task.kind,
    **setup.task.stored,
    "score_name": "accuracy",
    "penalty": float(model[-1].alpha_),
    "projection_digest": None,
    "best": epoch,
    "last": epoch,
    "history": [epoch],
    "stopped_early": False,
    "parameters": {**counts._asdict(), "adapter": 0},
    "learning_rates": {},
    "norms": [],
    "seconds": time.monotonic() - began,
    "members": 1,
    "data": setup.data.record(),
    "config": written,
    **results.provenance(),
  }
  folder.mkdir(parents=True, exist_ok=True)
  with lock_workdir(folder):
    write_config(folder, written)
    return results.write(folder, result)


def features(setup: Setup, split: str) -> Float32[np.ndarray, "images width"]:
  """What the head reads of each image of a split, in its order."""
  plan, model = setup.model.blueprint, setup.model
  width, _ = plan.shapes["classifier", "kernel"].shape
  module = plan.module.model.clone(outputs=width)
  head = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
  params = join(model.trainable, model.frozen) | {"classifier": head}
  run = jax.jit(module.apply)

  parts = []
  for batch in setup.data.eval_batches(split):
    pixels = setup.put_batch(batch)["pixel_values"]
    read = np.asarray(run({"params": params}, pixel_values=pixels))
    parts.append(read[batch["weights"] > 0])  # not those of empty rows
  return np.concatenate(parts)
