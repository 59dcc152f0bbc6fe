"""Makes projections.json for tests/adapters/test_projections.py.

  python -m tests.golden.make_projections

Digests of our own matrices pin their bits across devices and versions of jax;
the matrices of "peft" are made by PEFT itself, which needs torch.
"""

import json
from pathlib import Path

import torch
from peft import VeraConfig, get_peft_model

from vera_jax.adapters.interface import Target
from vera_jax.adapters.projections import digest, make_pair, make_projections

FILE = Path(__file__).with_name("projections.json")
OF_BITS = (
  *("kaiming_uniform", "uniform"),
  *("rademacher", "sparse_third", "sparse_root", "structured"),
)
PAIRS = [
  {"rank": rank, "inputs": inputs, "outputs": outputs, "seed": seed}
  for rank, inputs, outputs, seed in (
    (1, 1, 1, 0),
    (8, 16, 24, 0),
    (8, 16, 24, 7),
    (256, 384, 1536, 0),
    (1024, 768, 768, 3),
  )
]
PEFT = [
  {"rank": rank, "inputs": inputs, "outputs": outputs, "seed": seed}
  for rank, inputs, outputs, seed in (
    (8, 16, 24, 0),
    (8, 16, 24, 3),
    (64, 48, 40, 2**32 - 1),
  )
]


def ours(pair):
  """The digests of the initialisers whose bits are the same everywhere."""
  return {init: digest(make_pair(**pair, init=init)) for init in OF_BITS}


def unique():
  """The digest of two looped layers' own pairs."""
  targets = {(f"layer_{i}", "query"): Target(12, 16) for i in range(2)}
  settings = {"rank": 4, "seed": 5, "init": "kaiming_uniform"}
  return digest(make_projections(targets, **settings, sharing="unique"))


def theirs(rank, inputs, outputs, seed):
  """The digest and the first entries of PEFT's own pair."""
  model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs))
  config = VeraConfig(r=rank, projection_prng_key=seed, target_modules=["0"])
  peer = get_peft_model(model, config).base_model
  pair = {
    "A": peer.vera_A["default"].numpy(),
    "B": peer.vera_B["default"].numpy(),
  }
  first = {name: pair[name].flatten()[:6].tolist() for name in "AB"}
  return {"digest": digest(pair), **first}


def main():
  golden = {
    "pairs": [{"pair": pair, "digests": ours(pair)} for pair in PAIRS],
    "unique": unique(),
    "peft": [{"pair": pair, **theirs(**pair)} for pair in PEFT],
  }
  FILE.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
