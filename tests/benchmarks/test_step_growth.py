"""Exponents are those of the points, and the steps are real ones."""

from benchmarks import step_growth


def test_a_power_has_its_exponent_and_a_bend_shows():
  points = ((1, 1.0), (2, 4.0), (4, 32.0))  # squared, then cubed
  rows = [
    {"grows": "layers", "method": "vera", "to": to, "seconds": seconds}
    for to, seconds in points
  ]
  slopes = step_growth.exponents(rows, "layers", "vera", "seconds")
  assert slopes == "2.50 (3.00)"


def test_a_step_is_taken_and_more_tokens_need_more_memory(monkeypatch):
  monkeypatch.setattr(
    step_growth, "HERE", {**step_growth.HERE, "layers": 1, "rank": 4}
  )
  needs = []
  for tokens in (8, 64):
    step, memory = step_growth.prepared("vera", "tokens", tokens)
    step()
    needs.append(memory)
  assert needs[0] < needs[1]
