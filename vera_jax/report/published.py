"""The paper's own numbers: tables and figures of arXiv 2310.11454 v2, as data.

One `Cell` per number that its authors' own runs gave, and per row that they
compare with: its LoRA on GLUE is copied from LoRA's paper. Rows that they copy
of full fine-tuning, BitFit and adapters in Tables 2 and 3 are not here. Shares
are in percent. What the paper trains stands in configs/, not here: a cell has
only what tells its runs from others.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.interface import Target
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera


class Published(NamedTuple):
  """A score and its spread in percent, and the table that prints them."""

  score: float
  spread: float
  source: str


class Cell(NamedTuple):
  """A number of the paper.

  Attributes:
    table, row, column: where it stands.
    printed: as the paper has it; "> 1" is a claim about a figure.
    run: by flat key, the settings that tell its runs from others. A model is
      known by the last part of its name, a data set by a part of its source's.
    measure: what of a run is compared: "best" or "last", its epoch's score;
      "parameters"; "average", of the scores before it in its row; a judge's, a
      test metric's or another name of `verdict`.
    spread: the paper's, taken as the standard deviation of its runs.
    runs: how many the number is made of: 1 where the paper doesn't say.
    middle: "median" or "mean" of these.
    against: the settings of other runs, with which those of the same seed are
      compared.
    by: how: their "difference", "ratio", or "gain" (Figure 4).
    counted: the numbers that the paper's formula gives for its adapter.
    note: what a reader has to know of it.
  """

  table: str
  row: str
  column: str
  printed: str
  run: Mapping[str, Any]
  measure: str = "best"
  spread: float | None = None
  runs: int = 1
  middle: str = "median"
  against: Mapping[str, Any] | None = None
  by: str = ""
  counted: int | None = None
  note: str = ""

  @property
  def score(self) -> float:
    """The printed number; of a count in full."""
    match = re.fullmatch(r"[<>]? ?([\d.]+)([KM]?)", self.printed)
    assert match
    return float(match[1]) * {"": 1, "K": 1e3, "M": 1e6}[match[2]]

  @property
  def last_digit(self) -> float:
    """What one in the last printed digit stands for."""
    decimals = len(self.printed.rstrip("KM").partition(".")[2])
    unit = {"K": 1e3, "M": 1e6}.get(self.printed[-1], 1)
    return float(unit / 10**decimals)


TITLES = {
  "roberta-base": "RoBERTa-base",
  "roberta-large": "RoBERTa-large",
  "gpt2-medium": "GPT-2 medium",
  "gpt2-large": "GPT-2 large",
  "llama-7b": "Llama 7B",
  "llama-13b": "Llama 13B",
  "Llama-2-7b-hf": "Llama 2 7B",
  "Llama-2-13b-hf": "Llama 2 13B",
  "vit-base-patch16-224-in21k": "ViT-B",
  "vit-large-patch16-224-in21k": "ViT-L",
  **{"vera": "VeRA", "lora": "LoRA", "head": "head alone", "full": "full"},
}
BASE, LARGE = "roberta-base", "roberta-large"
VIT_B, VIT_L = (f"vit-{size}-patch16-224-in21k" for size in ("base", "large"))
PAIR = ("query", "value")
DEFAULTS = {
  "vera.d_init": 0.1,
  "vera.init": "kaiming_uniform",
  "vera.train": "both",
  "vera.sharing": "shared",
}
MNLI = "the paper's LoRA starts from an MNLI adapter, ours doesn't"
COPIED = "the paper copies LoRA's row; ours has VeRA's epochs and batches"

# model, method, rank, parameters, then the columns
TABLE_2 = """
roberta-base  lora 8    0.3M   95.1±0.2 89.7±0.7 63.4±1.2 93.3±0.3 86.6±0.7 91.5±0.2 86.6
roberta-base  vera 1024 0.043M 94.6±0.1 89.5±0.5 65.6±0.8 91.8±0.2 78.7±0.7 90.7±0.2 85.2
roberta-large lora 8    0.8M   96.2±0.5 90.2±1.0 68.2±1.9 94.8±0.3 85.2±1.1 92.3±0.5 87.8
roberta-large vera 256  0.061M 96.1±0.1 90.9±0.7 68.0±0.8 94.4±0.2 85.9±0.7 91.7±0.8 87.8
"""  # noqa: E501
GLUE = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")
TABLE_3 = """
gpt2-medium lora 4    0.35M  68.9 8.69 46.4 71.3 2.51
gpt2-medium vera 1024 0.098M 70.1 8.81 46.6 71.5 2.50
gpt2-large  lora 4    0.77M  70.1 8.80 46.7 71.9 2.52
gpt2-large  vera 1024 0.17M  70.3 8.85 46.9 71.6 2.54
"""
TABLE_4 = """
llama-7b       lora 64   159.9M 5.03
llama-7b       vera 1024 1.6M   4.77
llama-13b      lora 64   250.3M 5.31
llama-13b      vera 1024 2.4M   5.22
Llama-2-7b-hf  lora 64   159.9M 5.19
Llama-2-7b-hf  vera 1024 1.6M   5.08
Llama-2-13b-hf lora 64   250.3M 5.77
Llama-2-13b-hf vera 1024 2.4M   5.93
"""
TABLE_5 = f"""
{VIT_B} head -   -      77.7 86.1 98.4 67.2
{VIT_B} full -   -      86.5 90.8 98.9 78.9
{VIT_B} lora 8   294.9K 85.9 89.9 98.8 77.7
{VIT_B} vera 256 24.6K  84.8 89.0 99.0 77.0
{VIT_L} head -   -      79.4 76.5 98.9 67.8
{VIT_L} full -   -      86.8 78.7 98.8 79.0
{VIT_L} lora 8   786.4K 87.0 79.5 99.1 78.3
{VIT_L} vera 256 61.4K  87.5 79.2 99.2 78.6
"""
IMAGES = ("cifar100", "food101", "flowers102", "resisc45")
TABLE_13 = """
llama-7b lora 64  159.9M 7.36
llama-7b vera 256 1.4M   7.48
"""
# What is changed of RoBERTa-large's settings, then MRPC, RTE, CoLA, STS-B.
TABLE_6: dict[tuple[str, Any] | None, str] = {
  None: "90.5±0.7 85.8±0.7",
  ("vera.train", "d"): "89.7±0.0 67.0±13.9",
  ("vera.train", "b"): "81.6±10.1 64.3±11.5",
  ("vera.init", "kaiming_normal"): "90.0±1.1 82.6±5.2",
  ("vera.init", "uniform"): "68.9±1.3 53.1±0.8",
  ("vera.d_init", 1e-7): "90.8±0.9 84.7±0.9",
  ("vera.d_init", 1.0): "70.3±1.2 60.3±12.4",
}
TABLE_7: dict[tuple[str, Any] | None, str] = {
  None: "90.0±0.9 84.6±1.5 67.7±0.8 91.5±0.6",
  ("vera.sharing", "unique"): "90.7±0.3 84.6±0.8 68.3±1.8 91.5±0.2",
}
ABLATED = ("mrpc", "rte", "cola", "stsb")


def _square(layers: int, width: int) -> dict[tuple[str, ...], Target]:
  target = Target(width, width, (layers,))
  return {(name,): target for name in PAIR}


def _llama(
  layers: int, width: int, inner: int
) -> dict[tuple[str, ...], Target]:
  shapes = {name: (width, width) for name in "qkvo"}
  shapes |= {"gate": (width, inner), "up": (width, inner)}
  shapes |= {"down": (inner, width)}
  return {(name,): Target(*s, (layers,)) for name, s in shapes.items()}


# What the paper adapts of each model, so that its own formula can be counted.
ADAPTED = {
  BASE: _square(12, 768),
  LARGE: _square(24, 1024),
  "gpt2-medium": _square(24, 1024),
  "gpt2-large": _square(36, 1280),
  "llama-7b": _llama(32, 4096, 11008),
  "llama-13b": _llama(40, 5120, 13824),
  "Llama-2-7b-hf": _llama(32, 4096, 11008),
  "Llama-2-13b-hf": _llama(40, 5120, 13824),
  VIT_B: _square(12, 768),
  VIT_L: _square(24, 1024),
}


def counted(model: str, method: str, rank: int) -> int:
  """Trained numbers by the paper's formula, from the adapter's own leaves."""
  return adapter_size(
    vera(rank) if method == "vera" else lora(rank), ADAPTED[model]
  )


def _run(
  model: str, method: str, rank: int | None, **more: Any
) -> dict[str, Any]:
  run = {"model.name": model, "method": method, **more}
  if rank is not None:
    run[f"{method}.rank"] = rank
  if method == "vera":
    run |= DEFAULTS
  if method in ("vera", "lora") and model in (BASE, LARGE, VIT_B, VIT_L):
    run[f"{method}.targets"] = PAIR
  return run


def _rows(
  table: str,
  text: str,
  columns: Mapping[str, tuple[str, Mapping[str, Any]]],
  same: Mapping[str, Any] | None = None,
  *,
  runs: int = 1,
  middle: str = "median",
) -> Iterator[Cell]:
  """The cells of a table's text; `columns` has measure and settings of each."""
  for line in text.strip().splitlines():
    model, method, number, parameters, *numbers = line.split()
    rank = None if number == "-" else int(number)
    row = f"{TITLES[model]}, {TITLES[method]}"
    run = _run(model, method, rank, **(same or {}))
    if rank is not None:
      count = counted(model, method, rank)
      yield Cell(
        table, row, "parameters", parameters, run, "parameters", counted=count
      )
    for (column, (measure, more)), number in zip(
      columns.items(), numbers, strict=True
    ):
      printed, _, spread = number.partition("±")
      note = ""
      if (table, method) == ("Table 2", "lora"):
        moved = model == BASE and column in ("mrpc", "rte", "stsb")
        note = MNLI if moved else COPIED
      yield Cell(
        *(table, row, column, printed, {**run, **more}, measure),
        spread=float(spread) if spread else None,
        runs=runs,
        middle=middle,
        note=note,
      )


def _ablations(
  table: str, rows: Mapping[tuple[str, Any] | None, str]
) -> Iterator[Cell]:
  for change, text in rows.items():
    changed = dict([change]) if change else {}
    row = "default"
    if change:
      row = f"{change[0].removeprefix('vera.')} {change[1]}"
    for task, number in zip(ABLATED, text.split(), strict=False):
      printed, _, spread = number.partition("±")
      run = {**_run(LARGE, "vera", 256, task=task), **changed}
      yield Cell(
        *(table, row, task, printed, run),
        spread=float(spread),
        runs=5,
        middle="mean",
      )


@cache
def cells() -> tuple[Cell, ...]:
  """All of them, in the order of the paper."""
  rte = {"task": "rte"}
  large = _run(LARGE, "vera", 256, **rte)
  scores = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
  return (
    *_rows(
      "Table 2",
      TABLE_2,
      {task: ("best", {"task": task}) for task in GLUE}
      | {"average": ("average", {})},
      runs=5,
    ),
    *_rows("Table 3", TABLE_3, {s: (s, {}) for s in scores}, {"task": "e2e"}),
    *_rows(
      "Table 4", TABLE_4, {"MT-Bench": ("mt_bench", {})}, {"task": "instruct"}
    ),
    *_rows(
      "Table 5",
      TABLE_5,
      {name: ("best", {"data.source": name}) for name in IMAGES},
      {"task": "images"},
    ),
    *_ablations("Table 6", TABLE_6),
    *_ablations("Table 7", TABLE_7),
    *(
      Cell(
        "Table 12",
        "Llama 7B, rank 64",
        f"{column}, VeRA over LoRA",
        printed,
        _run("llama-7b", "vera", 64, task="instruct"),
        measure,
        against=_run("llama-7b", "lora", 64, task="instruct"),
        by="ratio",
        note=note,
      )
      for column, measure, printed, note in (
        ("time", "step_seconds", "1.018", "578 and 568 minutes there"),
        ("memory", "peak_bytes", "0.926", "21.69 and 23.42 GB there"),
      )
    ),
    *_rows(
      "Table 13",
      TABLE_13,
      {"Vicuna": ("vicuna", {})},
      {"task": "instruct"},
    ),
    Cell(
      "Figure 2",
      "RoBERTa-large on RTE, 98,304 parameters each",
      "VeRA r = 1024 less LoRA r = 1",
      "4",
      _run(LARGE, "vera", 1024, **rte),
      against=_run(LARGE, "lora", 1, **rte),
      by="difference",
      note="the claim in words; the figure's values are not printed",
    ),
    *(
      Cell(
        "Figure 3",
        "RoBERTa-large on RTE, norms of d",
        *(column, printed, large, measure),
        note=note,
      )
      for column, printed, measure, note in (
        ("smallest of a layer", "4", "smallest_d", "read off the plot"),
        ("largest of a layer", "12", "largest_d", "read off the plot"),
        ("query over value", "> 1", "query_over_value", ""),
        ("upper over lower half", "> 1", "upper_over_lower", ""),
      )
    ),
    *(
      Cell(
        "Figure 4",
        f"RoBERTa-large on RTE, {TITLES[method]}",
        "gain in percent per 1,000 parameters",
        printed,
        _run(LARGE, method, rank, **rte),
        against=_run(LARGE, "head", None, **rte),
        by="gain",
        counted=counted(LARGE, method, rank),
        note="over the head alone, whose score isn't printed",
      )
      for method, rank, printed in (("lora", 8, "0.18"), ("vera", 256, "2.64"))
    ),
  )


def belongs(
  settings: Mapping[str, Any], run: Mapping[str, Any], *, model: str = ""
) -> bool:
  """Whether a run's config has the settings `run`.

  Args:
    settings: the config's, by flat key.
    run: of a `Cell`.
    model: the model whose numbers are wanted although another was trained;
      then model and rank need not be the cell's.
  """
  for key, wanted in run.items():
    value = settings.get(key, DEFAULTS.get(key))
    if key == "model.name":
      same = (model or Path(str(value)).name).lower() == wanted.lower()
    elif key == "data.source":
      same = wanted in str(value).lower()
    elif key.endswith(".rank") and model:
      same = True
    else:
      same = (tuple(value) if isinstance(value, list) else value) == wanted
    if not same:
      return False
  return True


def published(
  config: Mapping[str, Any], model: str | None = None
) -> Published | None:
  """What the paper prints for a run's settings. Without such a row it is None.

  Args:
    config: a run's, as in its result.json.
    model: "roberta-base" or "roberta-large", whose row is wanted although
      another was trained; then the rank need not be the paper's.
  """
  settings = flatten_dict(dict(config), sep=".")
  for cell in cells():
    if cell.spread is not None and belongs(
      settings, cell.run, model=model or ""
    ):
      return Published(cell.score, cell.spread, cell.table)
  return None
