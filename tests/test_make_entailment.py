"""The committed task is what its script makes of seed 0.

Its other properties (balanced labels, no word of dev in train, no shortcut by
words or lengths) were checked when it was committed, and it has not changed.
"""

from pathlib import Path

import pytest

from experiments.make_entailment import make_splits, write_split

COMMITTED = Path(__file__).resolve().parents[1] / "experiments/entailment"


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_the_committed_file_is_what_seed_0_gives(split, tmp_path):
  pairs = make_splits(seed=0)[split]
  write_split(tmp_path / split, pairs, labelled=split != "test")
  committed = (COMMITTED / f"{split}.tsv").read_bytes()
  assert committed == (tmp_path / split).read_bytes()
