"""What the committed figures of a quantised base have to show."""

from pathlib import Path

from benchmarks.quantised import BASES, REMAT, markdown
from vera_jax.files import read_json

RESULTS = Path(__file__).parents[2] / "results/benchmarks"


def test_codes_take_as_little_memory_as_promised():
  """Linear layers, and the peak of a step where both rematerialise."""
  result = read_json(RESULTS / "quantised.json")
  rows = {(row["base"], row["remat"]): row for row in result["rows"]}
  assert set(rows) == {(base, remat) for base in BASES for remat in REMAT}
  plain = rows["float32", "full"]
  for base in ("keep", "nf4"):
    row = rows[base, "full"]
    assert row["linear_bytes"] <= 0.16 * plain["linear_bytes"]
    for peak in ("planned_bytes", "resident_bytes"):
      assert row[peak] <= 0.75 * plain[peak]
  same = [
    abs(x - y)
    for x, y in zip(
      plain["losses"], rows["keep", "full"]["losses"], strict=True
    )
  ]
  assert max(same) < 1e-4
  assert (RESULTS / "quantised.md").read_text() == markdown(result)
