"""Generates the rows that `make e2e` trains on: E2E's form, invented places.

This is generated English, no benchmark: scores on it say that training works.
The files have the form of microsoft/LoRA's E2E: on each line some facts about a
place, "||" and a text that says them, with spaces around punctuation.

An input has a name, a type and two to five further facts, drawn at random. Each
of its three texts follows another one of six plans, which say the facts in
another order and with other words. Train has 160 inputs (480 rows), valid and
test 20 each. Names, neighbours and dishes of valid and test come in train too,
their combinations don't.

  python -m experiments.make_e2e --out=experiments/e2e_rows
"""

import random

from absl import flags

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.files import write_text
from vera_jax.places import local_place

OUT = flags.DEFINE_string(
  "out", "experiments/e2e_rows", "folder for the three files"
)
SEED = flags.DEFINE_integer("seed", 0, "the committed files have seed 0")

INPUTS = {"train": 160, "valid": 20, "test": 20}
TEXTS = 3  # of each input
FIRST, SECOND = (
  "Amber Copper Crooked Drowsy Gilded Humble Lantern Mossy Painted Quiet",
  "Badger Barrel Fern Harbour Kettle Magpie Orchard Otter Spoon Thistle",
)
NAMES = [f"The {a} {b}" for a in FIRST.split() for b in SECOND.split()]
NEAR = [
  f"{a} {b}" for a in "Alder Brook Hazel".split() for b in "Hall Mill".split()
]
FACTS = {
  "food": "Basque Greek Korean Peruvian Polish Turkish".split(),
  "price": "cheap moderate high".split(),
  "customer rating": "low average excellent".split(),
  "area": ["old town", "harbour", "market square"],
  "family friendly": ["yes", "no"],
  "near": NEAR,
}
TYPES = ["restaurant", "pub", "café"]
# A fact's words as adjective, and as a sentence of its own.
PRICES = {
  "cheap": ("cheap", "Prices are low"),
  "moderate": ("moderately priced", "Prices are moderate"),
  "high": ("costly", "Prices are high"),
}
FRIENDLY = {
  "yes": ("family friendly", "Children are welcome"),
  "no": ("child free", "It is not for children"),
}
RATINGS = {
  "low": "guests rate it poorly",
  "average": "guests rate it as average",
  "excellent": "guests rate it as excellent",
}


def draw(rng: random.Random) -> dict[str, str]:
  """The facts of one place, in the order in which inputs have them."""
  chosen = rng.sample(list(FACTS), rng.randint(2, 5))
  facts = {"name": rng.choice(NAMES), "Type": rng.choice(TYPES)}
  return facts | {x: rng.choice(FACTS[x]) for x in FACTS if x in chosen}


def write(facts: dict[str, str], plan: int) -> str:
  """The facts as a text, by one of six plans."""
  name, kind, food = facts["name"], facts["Type"], facts.get("food", "")
  price, price_says = PRICES.get(facts.get("price", ""), ("", ""))
  family, family_says = FRIENDLY.get(facts.get("family friendly", ""), ("", ""))
  rated = RATINGS.get(facts.get("customer rating", ""), "")
  area = f"in the {facts['area']}" if "area" in facts else ""
  near = f"near {facts['near']}" if "near" in facts else ""
  it_is = family and f"it is {family}"
  serves = food and f"serving {food} food"
  it_serves = food and f"it serves {food} food"
  find_it = area and f"you find it {area}"
  plans = (
    [f"{name} is a {kind} {serves} {area} {near}", price_says, rated]
    + [family_says],
    [f"{near} {area} there is a {price} {food} {kind} called {name}"]
    + [it_is, rated],
    [f"{name} , a {family} {kind} {area} , welcomes you {near}", it_serves]
    + [price_says, rated],
    [f"the {price} {kind} {name} can be visited {area} {near}", it_serves]
    + [rated, it_is],
    [f"if you like {food or 'good'} food , try {name} {near}"]
    + [f"it is a {price} {family} {kind} {area}", rated],
    [f"{rated and f'{rated} :'} {name} is a {price} {kind} {near}", find_it]
    + [family_says, it_serves],
  )
  said = (" ".join(words.split()) for words in plans[plan] if words)
  return " ".join(f"{words[0].upper()}{words[1:]} ." for words in said)


def make_splits(seed: int) -> dict[str, list[tuple[str, str]]]:
  """(input, text) rows by split; no input is in two of them."""
  rng = random.Random(seed)
  used: set[str] = set()
  splits: dict[str, list[tuple[str, str]]] = {}
  for split, number in INPUTS.items():
    rows = splits.setdefault(split, [])
    while len(rows) < TEXTS * number:
      facts = draw(rng)
      one = " | ".join(f"{key} : {value}" for key, value in facts.items())
      if one not in used:
        used.add(one)
        rows += [(one, write(facts, i)) for i in rng.sample(range(6), TEXTS)]
  return splits


def main() -> None:
  """Writes train.txt, valid.txt and test.txt."""
  folder = local_place(OUT.value, "--out")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits(SEED.value).items():
      text = "".join(f"{one}||{said} \n" for one, said in rows)
      write_text(folder / f"{split}.txt", text)
      print(f"{folder / split}.txt: {len(rows)} rows")
  except OSError as error:
    raise UserError(
      f"--out={folder} can't be written: {error.strerror}."
    ) from error


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
