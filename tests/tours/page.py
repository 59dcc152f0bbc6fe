"""The table of the round trips, in a terminal and as docs/tour.md."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.tours.fixtures import PAIRS
from vera_jax import results

HEADER = ("step", "compared", "largest difference", "bound", "bytes written")
TEXTS = (*HEADER, "same texts")
SIZES = ("adapter", "trained numbers", "bytes here", "bytes in PEFT")
PEERS = ("torch", "peft", "gguf", "llama-cpp-py-sync")


class Texts(NamedTuple):
  """Greedy texts before and after a step, of decoders.

  Attributes:
    same: how many are equal.
    all: how many there are.
    least: how many have to be equal, in a step that moves nothing.
  """

  same: int
  all: int
  least: int


class Step(NamedTuple):
  """A step of a round trip, a row of the table.

  Attributes:
    arrow: what was turned into what.
    compared: the numbers before and after that were compared.
    difference: the largest one found.
    bound: the most that it may be; if `moved`, the least.
    moved: whether the step has to change the numbers.
    written: bytes of the files that it wrote.
    texts: of decoders.
  """

  arrow: str
  compared: str
  difference: float
  bound: float
  moved: bool = False
  written: int | None = None
  texts: Texts | None = None

  @property
  def passed(self) -> bool:
    texts = self.texts
    if self.moved:
      moved = texts is None or texts.same < texts.all
      return moved and self.difference >= self.bound
    kept = texts is None or texts.same >= texts.least
    return kept and self.difference <= self.bound

  def cells(self) -> list[str]:
    """As a row of a table."""
    size = "" if self.written is None else f"{self.written:,}"
    limit = f"{'≥' if self.moved else '≤'} {self.bound:g}"
    row = [self.arrow, self.compared, f"{self.difference:.1e}", limit, size]
    if self.texts:
      row.append(f"{self.texts.same} of {self.texts.all}")
    return row


class Size(NamedTuple):
  """Bytes of one adapter's two files, in our format and in PEFT's."""

  adapter: str
  numbers: int
  ours: int
  theirs: int

  def cells(self) -> list[str]:
    """As a row of a table."""
    return [self.adapter, *(f"{number:,}" for number in self[1:])]


Decoders = Mapping[str, Iterable[Step]]


def show(
  steps: Iterable[Step], decoders: Decoders, sizes: Iterable[Size]
) -> None:
  console = Console()
  tables: list[tuple[str | None, Sequence[str], Iterable[Step | Size]]] = [
    (None, HEADER, steps),
    *((name, TEXTS, trips) for name, trips in decoders.items()),
    (None, SIZES, sizes),
  ]
  for title, header, rows in tables:
    table = Table(title=title)
    for name in header:
      table.add_column(name)
    for row in rows:
      table.add_row(*row.cells())
    console.print(table)


PAGE = """# A tour of an adapter's files

For those who rely on adapters keeping their function in other formats.

An adapter that was trained here goes through every format that it can have,
and adapters that PEFT trained come here and go back. After each arrow the
logits of the same {pairs} pairs of sentences are compared with those before it.
A difference past its bound ends the tour with exit code 1; `make parity`,
which CI runs, takes it.

```
python -m tests.tours.run
```

writes this page and `tour.json`. The model is all-MiniLM-L6-v2, the data are
generated entailment pairs, both as in the quickstart; query and value are
adapted, VeRA and PVeRA with r = 256, LoRA and DoRA with r = 8, RandLoRA with
r = 32, Uni-LoRA with 7,680 numbers. Training is as short as the tour
needs to move the logits: no score here says anything.

{steps}

Bounds with ≥ are of steps that must change the logits. "LoRA export" of a VeRA
adapter has VeRA's rank, 256: exact, and large. To unmerge is to keep, not to
subtract: merging returns a new tree and writes a new folder, so the base's
bytes are what they were, and `merge.json` has its name and fingerprint.

## Decoders

A tiny random Llama and a tiny random GPT-2 learn 32 lines by VeRA with r = 16
on query and value, by `configs/language.py`. Beside the logits, which are those
of 6 rows of 16 tokens, the last column compares what is written greedily behind
6 prompts, 12 tokens each, with the tokenizer that the format brings. All texts
have to be the same, but in three steps: training has to change one of them at
least, and rounding to BF16 or Q8_0 may change some, so their number is only
stated.

{decoders}

GPT-2's query and value are parts of its fused `c_attn`, which PEFT adapts
whole: the exported adapter has twice the rank ([peft.md](peft.md)), and comes
back as one of the whole layer. "Unmerged" texts are written with the adapter
beside the weights, all others with merged weights. In F16 a weight is rounded
by at most 2^-11 of itself, in BF16 by 2^-9, in Q8_0 by 1/254 of the largest of
its 32; the bounds are below what training changed. llama.cpp has the adapter's
file beside the base in float32, and computes GPT-2's GELU by a table of
float16. transformers dequantises a GGUF file to float32, as we do, so that both
agree as closely as they do on a folder; sizes that it doesn't read from GPT-2's
header come from the folder's config.json.

Where torch is not installed, `make test` takes GPT-2's steps without it.

## Bytes

The same adapter, with its head, in both formats: `adapter.json` and
`adapter.safetensors` here, `adapter_config.json` and
`adapter_model.safetensors` in PEFT. "No projections" is PEFT's
`save_projection=False`: who reads that file must draw A and B as torch does.

{sizes}

A folder of ours has at most 4 bytes a trained number and 16 KiB, for any
method and depth: what consecutive layers train is one tensor in the file.

Made with {versions}; {hardware}; {seconds:.0f} seconds in all.
"""


def write_page(
  file: Path,
  steps: Iterable[Step],
  decoders: Decoders,
  sizes: Iterable[Size],
  *,
  seconds: float,
) -> None:
  """The whole page: text, all tables, what they were made with."""
  facts = provenance()
  text = PAGE.format(
    pairs=PAIRS["dev"],
    steps=_markdown(HEADER, steps),
    decoders="\n\n".join(
      f"### {name}\n\n{_markdown(TEXTS, trips)}"
      for name, trips in decoders.items()
    ),
    sizes=_markdown(SIZES, sizes),
    versions=", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    hardware=facts["hardware"],
    seconds=seconds,
  )
  file.write_text(text, encoding="utf-8")


def _markdown(header: Sequence[str], rows: Iterable[Step | Size]) -> str:
  cells = [header, ["---"] * len(header), *(row.cells() for row in rows)]
  cells = [[*row, *[""] * (len(header) - len(row))] for row in cells]
  return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def provenance() -> dict[str, Any]:
  versions = results.provenance()["versions"]
  versions |= {name: version(name) for name in PEERS}
  cores = len(os.sched_getaffinity(0))
  hardware = f"{cores} CPU core{'s'[: cores != 1]}, {platform.machine()}"
  return {"versions": versions, "hardware": hardware}
