"""Generates the quickstart's data: a two-sentence entailment task.

This is generated English, no benchmark: a score on it says that training
works, not how well a model understands language. The files have the format of
GLUE's RTE (`index sentence1 sentence2 label`, tab-separated, no quoting; the
test split has no label column).

A *pattern* is a premise and a hypothesis with slots. One filling of a pattern
makes a *square*: exchanging {a} with {b}, and their implied words {A} with
{B}, gives a second premise and a second hypothesis. A premise entails the
hypothesis of its own order only:

                          "Ann bought a fruit."   "Ann bought a tool."
  "Ann bought a peach."   entailment              not_entailment
  "Ann bought a drill."   not_entailment          entailment

Train (2,000 pairs) takes one pair of each square, the four in turn; dev (640)
and test (320) hold whole squares. So neither a sentence alone, nor the words
that the two share, nor their lengths tell the label (classifiers on these get
0.49 to 0.50 of dev): what does is the meaning of a word (a peach is a fruit,
Lyon is in France, mended is repaired). In one pair of ten, topic `both`, the
premise names a and b, and who has which decides: hard, and without word order
a matter of chance.

How dev and test differ from train:
  words     all their pairs: what fills the slots (names, nouns, adjectives,
            verbs, cities, and what they imply) comes from lists disjoint
            from train's, and none of it occurs in train.
  patterns  half of their pairs: the pattern is one that train doesn't hold.
            The other half follows train's patterns.
Dev and test share their word lists; no pair is in both.

  python -m experiments.make_entailment --out=experiments/entailment
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.files import write_text
from vera_jax.places import local_place

OUT = flags.DEFINE_string(
  "out", "experiments/entailment", "folder for the three files"
)
SEED = flags.DEFINE_integer("seed", 0, "the committed files have seed 0")

Words = dict[str, list[str]]


class Pattern(NamedTuple):
  """A premise and a hypothesis; `topic` names the list that fills a and b."""

  topic: str
  premise: str
  hypothesis: str


class Pair(NamedTuple):
  """Two sentences and entailment or not_entailment."""

  premise: str
  hypothesis: str
  label: str


def _patterns(text: str) -> list[Pattern]:
  rows = [line.split(" | ") for line in text.strip().splitlines()]
  return [Pattern(*row) for row in rows]


SEEN_PATTERNS = _patterns("""
kind | {name} bought a {a}. | {name} bought a {A}.
kind | {name} saw a {adj} {a}. | {name} saw a {A}.
kind | There is a {a} near the {noun}. | A {A} is near the {noun}.
kind | {name} lost the {a}. | What {name} lost was a {A}.
kind | The {a} was painted by {name}. | {name} painted a {A}.
kind | Every {A} here is {adj}. | The {a} here is {adj}.
kind | No {A} in this room is {adj}. | The {a} in this room is not {adj}.
kind | {name} drew a {noun} and a {a}. | {name} drew a {A}.
city | {name} lives in {a}. | {name} lives in {A}.
city | {name} and {name2} flew to {a}. | {name} flew to {A}.
city | {name} has never been to {A}. | {name} has never been to {a}.
city | {name} found the {noun} in {a}. | The {noun} was found in {A}.
deed | {name} {a} the {noun}. | {name} {A} the {noun}.
deed | The {noun} was {a} by {name}. | {name} {A} the {noun}.
deed | {name} {a} the {adj} {noun}. | The {noun} was {A} by {name}.
trait | {name} is very {a}. | {name} is {A}.
trait | {name} is {a} and {name2} knows it. | {name} is {A}.
trait | {name} is not {a}. | {name} is not {A}.
both | {name} has a {a}, {name2} has a {b}. | {name} has a {A}.
both | {name} wants a {a}, not a {b}. | {name} wants a {A}.
""")

NEW_PATTERNS = _patterns("""
kind | The {a} belongs to {name}. | {name} is the owner of a {A}.
kind | {name} gave the old {a} to {name2}. | {name2} got a {A}.
kind | All of the {A}s are {adj}. | Each {a} is {adj}.
kind | It was {name} who hid a {a}. | A {A} was hidden by {name}.
city | {name} will move to {a} soon. | Soon {name} will move to {A}.
city | {name} met {name2} in {a}. | {name2} was in {A}.
deed | It was {name} who {a} the {noun}. | {name} {A} the {noun}.
deed | The {noun} that {name} {a} is {adj}. | {name} {A} a {noun}.
trait | Everyone says that {name} is {a}. | People call {name} {A}.
both | {name} chose a {b}, {name2} chose a {a}. | {name2} chose a {A}.
""")


def _words(**lists: str) -> Words:
  return {name: text.split() for name, text in lists.items()}


TRAIN_WORDS = _words(
  name="""Anna Ben Clara David Emma Frank Grace Henry Irene Jack Kate Leo
  Maria Nick Olivia Paul Rosa Sam Tina Victor Alice Bruno Diana Eric Helen
  Ivan Julia Karl Laura Martin""",
  noun="""ball box cup lamp table bag book hat clock bowl vase spoon plate
  mirror pillow bottle candle ladder bucket basket kite blanket""",
  adj="heavy dusty broken cheap useful round new clean strange big",
  kind="""rose:flower tulip:flower daisy:flower lily:flower hammer:tool
  wrench:tool drill:tool shovel:tool sparrow:bird falcon:bird crow:bird
  pigeon:bird truck:vehicle van:vehicle bus:vehicle taxi:vehicle
  banana:fruit peach:fruit pear:fruit plum:fruit chair:seat bench:seat
  stool:seat sofa:seat coat:garment skirt:garment
  sweater:garment scarf:garment collie:dog poodle:dog terrier:dog
  hound:dog""",
  city="""Paris:France Lyon:France Berlin:Germany Munich:Germany
  Hamburg:Germany Rome:Italy Milan:Italy Venice:Italy Tokyo:Japan
  Osaka:Japan Kyoto:Japan Moscow:Russia Delhi:India Mumbai:India
  Calcutta:India Cairo:Egypt Alexandria:Egypt Sydney:Australia
  Melbourne:Australia Perth:Australia Toronto:Canada Montreal:Canada
  Vancouver:Canada""",
  deed="""purchased:bought constructed:built repaired:fixed selected:chose
  collected:gathered concealed:hid discovered:found demolished:destroyed
  displayed:showed examined:inspected scrubbed:cleaned tossed:threw
  smashed:broke shipped:sent dragged:pulled""",
  trait="""glad:happy wealthy:rich clever:smart sick:ill fearless:brave
  powerful:strong renowned:famous occupied:busy hilarious:funny
  fatigued:tired starving:hungry stunning:beautiful freezing:cold
  terrified:afraid drowsy:sleepy wed:married""",
)

HELD_OUT_WORDS = _words(
  name="""Peter Sarah Tom Nora Oscar Lucy Simon Mary Robert Jane Walter Susan
  George Linda Philip Ruth Adam Carol Edward Nancy""",
  noun="""coin ring shirt phone desk pencil jacket wallet camera rope shelf
  carpet necklace radio towel""",
  adj="wet dirty costly lovely wooden shiny small grey",
  kind="""pine:tree cedar:tree maple:tree willow:tree salmon:fish trout:fish
  shark:fish sword:weapon dagger:weapon rifle:weapon carrot:vegetable
  cabbage:vegetable potato:vegetable canoe:boat ferry:boat yacht:boat
  beetle:bug wasp:bug moth:bug""",
  city="""Madrid:Spain Barcelona:Spain Seville:Spain Beijing:China
  Shanghai:China Nanjing:China Lisbon:Portugal
  Stockholm:Sweden Gothenburg:Sweden Athens:Greece Warsaw:Poland
  Krakow:Poland Lahore:Pakistan Karachi:Pakistan""",
  deed="""created:made grabbed:took required:needed donated:gave
  observed:watched lifted:raised adored:loved
  wrecked:ruined mended:patched modified:changed""",
  trait="""furious:angry silent:quiet elderly:old truthful:honest
  courteous:polite youthful:young slim:thin cruel:mean joyful:cheerful
  lonesome:lonely""",
)


def _values(topic: str, words: Words, rng: random.Random) -> dict[str, str]:
  """One filling: a, A, b, B of the topic, and distinct words for the rest."""
  topic = "kind" if topic == "both" else topic
  while True:
    (a, A), (b, B) = (w.split(":") for w in rng.sample(words[topic], 2))
    if A != B:
      break
  values = {"a": a, "A": A, "b": b, "B": B}
  for slot in ("name", "noun", "adj"):
    values[slot], values[slot + "2"] = rng.sample(words[slot], 2)
  return values


def square(pattern: Pattern, words: Words, rng: random.Random) -> list[Pair]:
  """The four pairs of one filling: not, entailed, entailed, not."""
  values = _values(pattern.topic, words, rng)
  swap = {"a": "b", "b": "a", "A": "B", "B": "A"}
  orders = values, {slot: values[swap.get(slot, slot)] for slot in values}
  return [
    Pair(
      pattern.premise.format(**orders[first]),
      pattern.hypothesis.format(**orders[second]),
      "entailment" if first == second else "not_entailment",
    )
    for first, second in ((0, 1), (0, 0), (1, 1), (1, 0))
  ]


def _squares(
  patterns: list[Pattern],
  words: Words,
  each: int,
  used: set[Pair],
  rng: random.Random,
) -> Iterator[list[Pair]]:
  """`each` squares of every pattern, none with a pair made before."""
  for pattern in patterns:
    made = 0
    while made < each:
      pairs = square(pattern, words, rng)
      if used.isdisjoint(pairs):
        used.update(pairs)
        made += 1
        yield pairs


def make_splits(seed: int) -> dict[str, list[Pair]]:
  """Train, dev and test, each balanced as a whole and in each pattern."""
  rng = random.Random(seed)
  used: set[Pair] = set()
  train = _squares(SEEN_PATTERNS, TRAIN_WORDS, 100, used, rng)
  splits = {"train": [square[i % 4] for i, square in enumerate(train)]}
  for split, seen, new in (("dev", 4, 8), ("test", 2, 4)):
    squares = [
      *_squares(SEEN_PATTERNS, HELD_OUT_WORDS, seen, used, rng),
      *_squares(NEW_PATTERNS, HELD_OUT_WORDS, new, used, rng),
    ]
    splits[split] = [pair for square in squares for pair in square]
  for pairs in splits.values():
    rng.shuffle(pairs)
  return splits


def write_split(path: Path, pairs: list[Pair], *, labelled: bool) -> None:
  """Writes one of RTE's files; without labels, the column is left out too."""
  columns = ["index", "sentence1", "sentence2", "label"]
  rows = [columns, *([str(i), *pair] for i, pair in enumerate(pairs))]
  lines = ["\t".join(row if labelled else row[:3]) + "\n" for row in rows]
  write_text(path, "".join(lines))


def main() -> None:
  """Writes train.tsv, dev.tsv and test.tsv."""
  folder = local_place(OUT.value, "--out")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in make_splits(SEED.value).items():
      path = folder / f"{split}.tsv"
      write_split(path, pairs, labelled=split != "test")
      print(f"{path}: {len(pairs)} pairs")
  except OSError as error:
    raise UserError(
      f"--out={folder} can't be written: {error.strerror}."
    ) from error


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
