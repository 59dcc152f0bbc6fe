"""Both sides of the benchmark of decoding, on a tiny decoder."""

from pathlib import Path

import pytest

from benchmarks import decode
from tests.generate.conftest import tiny_decoder  # noqa: F401
from vera_jax.files import read_json

WORKS = [work for works in decode.WORKS.values() for work in works]
RESULTS = Path(__file__).parents[2] / "results/benchmarks"


@pytest.mark.parity
def test_both_sides_give_the_same_texts(tiny_decoder):  # noqa: F811
  pytest.importorskip("torch")
  new = 6
  prompts = [f"w{i} w{i + 2} w{2 * i % 20}" for i in range(16)]
  settings = {"folder": str(tiny_decoder), "prompts": prompts}
  found = decode.measure(
    [decode.OURS, decode.TORCH],
    settings | {"new_tokens": new},
    works=WORKS,
    calls=1,
  )
  assert found["prompt_tokens"] == [3] * 16
  assert len(found["rows"]) == 6
  for ours, theirs in zip(found["rows"][::2], found["rows"][1::2], strict=True):
    assert ours["same_texts"] == ours["prompts"] == theirs["prompts"]
    assert ours["best"] == ours["prompts"] * new / min(ours["seconds"])
    times = theirs["seconds"][0] / ours["seconds"][0]
    assert ours["best_ratio"] == pytest.approx(times)
    assert theirs["peak_bytes"] > 50e6


@pytest.mark.parametrize("how", decode.WORKS)
def test_the_table_is_of_the_figures(how):
  result = read_json(RESULTS / f"decode-{how}.json")
  page = decode.markdown(result)
  assert page == (RESULTS / f"decode-{how}.md").read_text(encoding="utf-8")
  ours = [row for row in result["rows"] if row["side"] == decode.OURS]
  alone = decode.markdown(result | {"rows": ours, "torch_threads": []})
  assert (
    alone.count("| vera_jax |") == len(decode.WORKS[how])
    and "| torch |" not in alone
  )
  assert "torch is left out" in alone and "torch is left out" not in page
