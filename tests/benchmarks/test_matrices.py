"""The costs of the random pair, and the tables of docs/initialisation.md."""

from pathlib import Path

import jax
import pytest

from benchmarks import initialisers, matrices
from vera_jax.adapters.projections import INITIALISERS
from vera_jax.files import read_json

RESULTS = Path(__file__).parents[2] / "results"
each_device = pytest.mark.parametrize("device", ["v5e", "cpu"])


def committed(device):
  rows = read_json(RESULTS / f"benchmarks/matrices-{device}.json")["rows"]
  return {
    tuple(row[x] for x in ("network", "work", "pair", "plan")): row
    for row in rows
  }


@each_device
def test_a_decoded_token_at_405b(device):
  """A quarter of the dense pair's FLOPs at most, and no matrix is kept."""
  rows = committed(device)

  def added(pair):
    place = "Llama-405B, all linear", matrices.DECODING
    row = rows[*place, pair, "factored"]
    return row["flops"] - rows[*place, matrices.NONE, ""]["flops"], row

  flops, row = added(matrices.STRUCTURED)
  assert 0 < flops <= added(matrices.DENSE)[0] / 4
  assert all(x.startswith("int8[2, ") for x in row["pair_arguments"])
  assert row["pair_bytes"] < 1e6


def test_no_matrix_is_among_a_programs_arguments(monkeypatch):
  monkeypatch.setattr(matrices, "RANK", 24)
  network = matrices.Network(1, ((64, (48, 16)),), tokens=8)
  compiled, pair = matrices.compile_layer(
    network,
    matrices.STRUCTURED,
    "factored",
    tokens=1,
    training=False,
    device=jax.devices()[0],
    dtype="float32",
  )
  (given, _) = compiled.in_avals
  sizes = sorted(x.size for x in jax.tree.leaves(given))
  # two kernels, x, d and b of two layers, and the signs of three widths
  assert sizes == sorted([64 * 48, 64 * 16, 64, 24, 24, 48, 16, 128, 96, 48])
  assert pair.keys() == {"A_64", "B_48", "B_16"}


def test_every_initialiser_is_in_the_table():
  assert initialisers.ROWS.keys() == set(INITIALISERS)
  assert len(initialisers.markdown().splitlines()) == 2 + len(INITIALISERS)


def test_the_studys_table():
  """On committed results of some of them, at one rank."""
  made = initialisers.scores(RESULTS / "sweeps/ablations")
  _, table, figure = made.split("\n\n")
  row = next(line for line in table.splitlines() if "`orthogonal`" in line)
  assert "| 79.1 (79.0 to 81.5) |" in row
  first = next(x for x in table.splitlines() if "`kaiming_uniform`" in x)
  assert first.endswith("|  |")
  assert "figures/ablations-scores.png" in figure
