"""The generated rows are what their script says."""

from pathlib import Path

import pytest

from experiments.make_e2e import INPUTS, TEXTS, make_splits
from vera_jax.tasks.e2e_files import read_split

COMMITTED = Path(__file__).resolve().parents[1] / "experiments/e2e_rows"


@pytest.fixture(scope="module")
def splits():
  return make_splits(seed=0)


@pytest.mark.parametrize("split", INPUTS)
def test_the_committed_rows_are_what_seed_0_gives(split, splits):
  rows = read_split(COMMITTED, split)
  assert list(zip(*rows, strict=True)) == splits[split]
  groups = rows.grouped()
  assert len(groups) == INPUTS[split]
  assert {len(texts) for texts in groups.values()} == {TEXTS}
