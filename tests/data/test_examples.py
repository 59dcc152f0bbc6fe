import numpy as np
import pytest

from vera_jax.data.examples import Examples, subset
from vera_jax.errors import UserError


def examples(n: int, *, pairs: bool = True) -> Examples:
  return Examples(
    first=[f"a{i}" for i in range(n)],
    second=[f"b{i}" for i in range(n)] if pairs else None,
    labels=np.arange(n, dtype=np.int32),
    index=np.arange(n),
    places=[f"a.csv:{i}" for i in range(n)],
  )


def test_subset_is_the_start_of_the_seeded_permutation():
  chosen = np.random.default_rng(5).permutation(20)[:7]
  part = subset(examples(20), 7, 5)
  assert part.first == [f"a{i}" for i in chosen]
  assert part.second == [f"b{i}" for i in chosen]
  np.testing.assert_array_equal(part.labels, chosen)
  np.testing.assert_array_equal(part.index, chosen)
  assert part.places == [f"a.csv:{i}" for i in chosen]


def test_subset_of_single_sentences_and_of_all():
  assert subset(examples(4, pairs=False), 2, 0).second is None
  whole = examples(4)
  assert subset(whole, None, 0) is whole
  assert sorted(subset(whole, 4, 0).first) == whole.first


@pytest.mark.parametrize("n", [0, -1, 5])
def test_subset_beyond_the_split(n):
  with pytest.raises(UserError, match="max_train_examples.*4 examples"):
    subset(examples(4), n, 0)
