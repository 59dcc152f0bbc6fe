"""Adapters with random leaves on any base, as a run's end leaves them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.files import save_adapter
from vera_jax.adapters.labels import FROZEN
from vera_jax.adapters.projections import PRNG, kept_digest
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import fingerprint, load_params
from vera_jax.models.kinds import KINDS, kind_of
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.tasks.glue_facts import glue_task

QUERY_VALUE: dict[str, Any] = {"targets": ["query", "value"]}
DRAWN: dict[str, Any] = {
  "init": "kaiming_uniform",
  "projection_seed": 0,
  **QUERY_VALUE,
}
LORA: dict[str, Any] = {"rank": 2, "alpha": 4.0, **QUERY_VALUE}
SETTINGS: dict[str, dict[str, Any]] = {
  "vera": {
    **{"rank": 8, "d_init": 0.1, **DRAWN},
    **{"train": "both", "sharing": "shared", "conv": "whole"},
  },
  "lora": {**LORA, "scaling": "rank"},
  "ia3": {"targets": ["key", "value"], "feedforward": []},
  "lora_fa": {**LORA, "scaling": "root", "projection_seed": 1},
  "onelora": QUERY_VALUE,
  "pvera": {"rank": 8, "d_init": 0.1, **DRAWN},
  "randlora": {**DRAWN, "rank": 5, "alpha": 5.0, "init": "uniform"},
  "unilora": {
    **{"rank": 2, "size": 50, "theta_init": 0.02, "projection_seed": 3},
    **QUERY_VALUE,
  },
  "tied_lora": {"rank": 6, "d_init": 0.1, **QUERY_VALUE},
  "bitfit": {"biases": ".*"},
}
SETTINGS |= {"dora": SETTINGS["lora"], "dvora": SETTINGS["vera"]}
SETTINGS["dvora+ia3"] = {name: SETTINGS[name] for name in ("dvora", "ia3")}
SETTINGS["vera+bitfit"] = {name: SETTINGS[name] for name in ("vera", "bitfit")}


def write_adapter(
  folder: Path,
  method: str = "vera",
  *,
  base: Path,
  task: str = "rte",
  kind: str | None = None,
  scan: bool = True,
  spread: float = 0.2,
  **settings: Any,
) -> None:
  """Leaves of a deviation of `spread`; other keywords are settings."""
  labels = () if kind else glue_task(task).labels
  kind = kind_of({"kind": kind}, labels)
  settings = {**SETTINGS.get(method, {}), **settings}
  plan = blueprint(
    read_fields(base),
    outputs=len(labels) or 1,
    head=KINDS[kind].head,
    method=method,
    settings=settings,
    scan=scan,
  )
  init, key = plan.module.init, jax.random.key(0)
  shapes = jax.eval_shape(init, key, **plan.inputs)["params"]
  kinds = flatten_dict(plan.label(shapes))
  weights = load_params(base, unflatten_dict(plan.shapes)).params
  projections = plan.projections(jax.tree.map(jnp.asarray, weights))
  rng = np.random.default_rng(7)
  trained = {
    path: (spread * rng.standard_normal(leaf.shape)).astype(np.float32)
    + np.float32(path[-1] == "scale")
    for path, leaf in sorted(flatten_dict(shapes).items())
    if kinds[path] != FROZEN
  }
  about = {
    "task": task,
    "method": method,
    "settings": settings,
    "base": str(base),
    "base_fingerprint": fingerprint(base),
    "labels": list(labels),
    "kind": kind,
    "projection_prng": PRNG,
    "projection_digest": kept_digest(plan.adapter, projections),
    "max_length": 16,
  }
  save_adapter(folder, unflatten_dict(trained), about=about)
