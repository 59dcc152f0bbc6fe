"""Results as runs leave them, made up."""

import json

import pytest

from configs import rte
from vera_jax.report.frame import Sweep, frame


@pytest.fixture(scope="session")
def make_result():
  """A result.json's contents; keywords are settings: vera__rank=4."""

  def make(
    method="vera",
    seed=0,
    scores=(0.6, 0.7),
    *,
    losses=None,
    collapsed=False,
    norms=(),
    adapter=1792,
    size="large",
    **settings,
  ):
    config = rte.get_config(size)
    changes = {key.replace("__", "."): x for key, x in settings.items()}
    config.update_from_flattened_dict(
      {"method": method, "seed": seed, "optim.epochs": len(scores), **changes}
    )
    losses = losses or [0.7 / (i + 1) for i in range(len(scores))]
    history = [
      {
        "epoch": i + 1,
        "step": 10 * (i + 1),
        "train_loss": loss,
        "score": score,
        "collapsed": collapsed,
      }
      for i, (score, loss) in enumerate(zip(scores, losses, strict=True))
    ]
    return {
      "task": config.task,
      "method": method,
      "seed": seed,
      "score_name": "accuracy",
      "best": max(history, key=lambda epoch: epoch["score"]),
      "last": history[-1],
      "history": history,
      "parameters": {"adapter": adapter, "head": 770, "frozen": 10**6},
      "norms": [dict(vector) for vector in norms],
      "seconds": 10.0,
      "config": json.loads(json.dumps(config.to_dict())),
    }

  return make


@pytest.fixture(scope="session")
def rank_sweep(make_result) -> Sweep:
  """VeRA at ranks 1, 16, 256 against LoRA at 1 and 8, three seeds."""
  scores = {
    ("vera", 1): (60, 61, 62),
    ("vera", 16): (69, 70, 71),
    ("vera", 256): (70, 71, 72),
    ("lora", 1): (61, 63, 65),
    ("lora", 8): (72, 74, 75),
  }
  found = [
    make_result(
      method,
      seed,
      (0.5, score / 100),
      adapter=rank * (100 if method == "lora" else 10) + 500,
      norms=[
        {"layer": n, "kind": kind, "leaf": leaf, "size": 4, "norm": 1.0 + n}
        | {"rms": 0.5 + n / 2}
        for n in range(3)
        for kind in ("query", "value")
        for leaf in "db"
        if method == "vera"
      ],
      **{f"{method}__rank": rank},
    )
    for (method, rank), row in scores.items()
    for seed, score in enumerate(row)
  ]
  return Sweep("Ranks", "", frame(found), [])
