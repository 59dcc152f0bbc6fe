"""The costs of the random pair, and the tables of docs/initialisation.md."""

import jax

from benchmarks import matrices


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
