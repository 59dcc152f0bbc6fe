"""What adapters of the load test are asked, and the words that they answer."""

import itertools

# Of several lengths; each adapter answers all of them with its own name.
PROMPTS = tuple(
  "One day " + "the cat sat and the dog ran and " * count + "said:"
  for count in (0, 1, 3)
)
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def words(count: int) -> list[str]:
  """Words of three syllables."""
  triples = itertools.product(SYLLABLES, repeat=3)
  step = len(SYLLABLES) ** 3 // count  # so that their beginnings differ
  chosen = itertools.islice(triples, 0, None, step)
  return ["".join(three) for three in itertools.islice(chosen, count)]
