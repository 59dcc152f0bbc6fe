"""docs/mathematics.md says what the library counts."""

from pathlib import Path

import pytest

from benchmarks import mathematics

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/mathematics.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")


def test_the_table_of_counts():
  page = PAGE.read_text(encoding="utf-8")
  for title, layers in mathematics.NETWORKS.items():
    counts = (
      mathematics.vera_count(layers, 1024),
      mathematics.lora_count(layers, 16),
      mathematics.lora_count(layers, 1024),
    )
    assert f"| {title} | " + " | ".join(f"{x:,}" for x in counts) in page


def test_where_each_order_is_the_cheapest():
  plans = [(1, "factored"), (385, "folded_forward"), (615, "folded")]
  assert mathematics.cheapest(1024, 2000) == plans
  assert mathematics.cheapest(256, 2000) == plans[:2]
  page = PAGE.read_text(encoding="utf-8")
  assert "fewer than 385 tokens" in page and "from 615 tokens on" in page
  for tokens in (16, 8192):
    priced = mathematics.step_costs(tokens, 8, lora=True)
    assert min(priced, key=priced.get) == "factored"


@pytest.mark.parametrize("rank", [16, 256])
def test_the_adapters_output_has_one_size_at_every_rank(rank):
  size = mathematics.output_scale(rank, "kaiming_uniform")
  assert abs(size - 0.2) < 0.015  # of 64 x 768 entries and one draw


def test_the_costs_are_those_of_the_page():
  i = o = 768
  for t, r in ((100, 256), (1000, 1024)):
    assert mathematics.step_costs(t, r) == {
      "factored": 2 * t * r * (i + o),
      "folded": 2 * r * i * o + t * i * o,
      "folded_forward": r * i * o + t * r * (i + o),
    }
