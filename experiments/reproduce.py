"""The page docs/reproduce.md: how each table and figure of the paper is made.

  python -m experiments.reproduce > docs/reproduce.md

Commands, weights, data, expected numbers with what they may be off by, and
estimates of chip-hours, all from configs/paper.py, configs/open_choices.py, the
sweeps and vera_jax/report/published.py. Nothing is trained.
"""

import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import groupby
from typing import NamedTuple

from configs import open_choices, paper
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.pretrained.sharding import AXES, Together, mesh_sizes
from vera_jax.report import verdict
from vera_jax.report.published import Cell, cells
from vera_jax.report.verdict import contradiction, tolerance_of
from vera_jax.sweep import estimate
from vera_jax.sweep.plan import SweepRun, make_plan, make_units
from vera_jax.tasks.task import Size
from vera_jax.train.flops import PEAK

SHARE = 0.3  # of a chip's peak that training is assumed to reach
CHIPS = {"v5e-8": ("TPU v5 lite", 8), "H100": ("NVIDIA H100 80GB HBM3", 1)}
# What the tasks' own data say once they are there: training examples, scored
# ones, tokens of an example. E2E's and Alpaca's tokens are rounded means.
SIZES = {
  "e2e": Size(42_061, 4_672, 60),
  "instruct": Size(49_760, 2_000, 175),
  "cifar100": Size(1_000, 10_000, 197),
  "food101": Size(1_010, 25_250, 197),
  "flowers102": Size(1_020, 6_149, 197),
  "resisc45": Size(450, 31_050, 197),
}

PAGE = """# Reproduce the paper

For those with the paper's networks and the hardware for them.

For each table and figure of VeRA's paper (arXiv 2310.11454 v2): the command,
what it needs, the numbers to expect, and a verdict on each. **None was run by
us at these sizes**, for want of the weights; a command rehearses them on random
weights, up to the verdict ([below](#the-rehearsal)). This page is made by
`vera-jax reproduce`; a test holds it to the sweeps and to the
paper's numbers in `vera_jax/report/published.py`.

## Commands

{commands}

A command that is given again goes on where it was stopped. Weights and data
come from the hub, or from folders: `--config.base.model.name=FOLDER`, where the
folder has the model's own name (`…/roberta-base`), and
`--config.base.data.source=FOLDER`. [sweeps.md](sweeps.md) has more: several
machines, several devices, estimates.

`--against=paper` takes several folders, for the two sizes of a table. For
Tables 4 and 13 the answers go to FastChat's `gen_judgment`, whose file
`--judgments=FILE` names. Table 1 is counted from shapes, and
[table1.md](table1.md) has its verdicts. Tables 8 to 11 are settings: they are
in `configs/`, and `tests/test_configs.py` holds them there. Figure 1 is a
drawing. Appendices D (the angle between VeRA's and LoRA's deltas) and E (both
fitted to random matrices) have no command here.

## What they need, and what they cost

{needs}

Chip-hours are estimates, not measurements: counted products
(`vera_jax/sweep/estimate.py`) at {share:.0%} of the chip's peak in bfloat16,
which is an assumption, and {start:.0f} s for each start. On v5e-8 the hours of
all eight chips count. Steps of few rows, and E2E's float32, stay further below
the peak. Texts that are written, and what a judge costs, are not counted. "On
v5e-8" is how the first program's runs are split over eight chips. Once a sweep
has a finished run, `vera-jax sweep --dry_run` goes by that one.

## The rule

{rule}

"≤" below is how far ours may be off if our runs spread as the paper's do (its ±
is taken as the standard deviation of its runs). Where it is missing, the paper
prints no spread, and ours alone decide; a score of which the paper doesn't say
how many runs it comes from counts as one run. Behind a printed number of
parameters stands what the formula gives.

## Expected numbers

{expected}

## What contradicts the paper's own formula

{contradictions}

[table1.md](table1.md) has three more. The counts of Table 3's LoRA are those of
LoRA's own paper.

## What the paper leaves open

Our choice for each stands in `configs/open_choices.py` alone, and is changed
there or, where it is a setting, with `--config.base.KEY=VALUE`. A run that
chooses otherwise gets its verdict with the settings that differ. RoBERTa's head
is no choice of ours: transformers' `RobertaForSequenceClassification` puts a
dense layer with tanh and the output layer on the first token, without a pooler;
both are trained.

{choices}

## The rehearsal

```
vera-jax rehearse --out=FOLDER --tokenizers=FOLDER
vera-jax rehearse --out=FOLDER --small --only="Table 2"
```

makes random weights in the hub's layout by transformers and torch (`make
parity`), in the models' own shapes cut to two layers (`--small`: 64 wide),
writes data in the form of GLUE's, E2E's, Alpaca's and the images' files, and
then runs the commands of this page for one epoch each, answers and a judge that
draws its scores included, up to the verdicts. `--tokenizers` takes folders
`roberta-base`, `gpt2` and `llama` with the models' own tokenizers; without it
byte-level ones of the same form stand in. It fails if a number of the paper has
no verdict, but for those that need Java (METEOR, ROUGE-L, CIDEr) or a device
that says its peak of memory, where there is none. `--one` trains one run of
each sweep, and four of Figure 2's, whose number is a difference; the slow tests
do so for a table of each task. In full it is {programs} programs for
{runs} runs.

{rehearsed}
"""


class Cost(NamedTuple):
  """Chip-hours by `CHIPS`, runs, the programs that train them, and how the
  first one lies on v5e-8."""

  hours: dict[str, float]
  runs: int
  programs: int
  plan: str


def main() -> None:
  sys.stdout.write(page())


def page() -> str:
  """The page in Markdown."""
  sweeps = (name for one in paper.SOURCES.values() for name in one.sweeps)
  together = cost_of(tuple(dict.fromkeys(sweeps)))
  return PAGE.format(
    commands=_commands(),
    needs=_needs(),
    share=SHARE,
    start=estimate.START,
    rule=_rule(),
    expected=_expected(),
    contradictions=_contradictions(),
    choices=_choices(),
    programs=together.programs,
    runs=together.runs,
    rehearsed=rehearsed(),
  )


def rehearsed() -> str:
  """Which sweeps were rehearsed, and how far."""
  every = {name for one in paper.SOURCES.values() for name in one.sweeps}
  done = {name for names in paper.REHEARSED.values() for name in names}
  fill = partial(textwrap.fill, width=80, break_on_hyphens=False)
  first = fill(
    f"Of the {len(every)} sweeps {len(done)} were taken to their verdicts, on"
    " two CPU cores, with the tokenizers of RoBERTa and GPT-2 and a small"
    " Llama's:"
  )
  lines = [
    fill(
      f"- {how} of {_sweeps(names)}"
      f" (`--small{'' if how == 'all runs' else ' --one'}`)",
      subsequent_indent="  ",
    )
    for how, names in paper.REHEARSED.items()
  ]
  lacking = [_sweeps(sorted(every - done))] if every - done else []
  last = f"Not rehearsed: {', '.join([*lacking, 'the real widths'])}."
  return "\n\n".join([first, "\n".join(lines), fill(last)])


def _sweeps(names: Iterable[str]) -> str:
  return ", ".join(f"`{name.replace(':', '.py:')}`" for name in names)


def folder_of(name: str) -> str:
  """A sweep's folder on the page: "glue:base" is DIR/glue-base."""
  return f"DIR/{name.replace(':', '-')}"


def sweep_command(name: str) -> list[str]:
  """The command that trains a sweep, without its data."""
  study, _, variant = name.partition(":")
  config = f"--config=sweeps/{study}:{variant}"
  workdir = f"--workdir={folder_of(name)}"
  return ["vera-jax", "sweep", config, workdir]


def report_command(table: str) -> list[str]:
  """The command that gives the verdicts of a table."""
  folders = [folder_of(name) for name in paper.SOURCES[table].sweeps]
  return ["vera-jax", "report", *folders, "--against=paper"]


def _commands() -> str:
  parts = ["**Table 1**: parameters and bytes\n\n" + _block(["table1"])]
  # tables of the same sweeps stand together
  for _, same in groupby(
    paper.SOURCES, key=lambda table: paper.SOURCES[table].sweeps
  ):
    tables = [*same]
    source = paper.SOURCES[tables[0]]
    lines = [" ".join(sweep_command(name)[1:]) for name in source.sweeps]
    if source.data_flag:
      lines = [f"{line} {source.data_flag}" for line in lines]
    if source.after:
      lines.append(source.after)
    report = " ".join(report_command(tables[0])[1:])
    if source.after:
      report += " --judgments=FILE"
    shown = "; ".join(f"**{t}**: {paper.SOURCES[t].shows}" for t in tables)
    parts.append(f"{shown}\n\n" + _block([*lines, report]))
  return "\n\n".join(parts)


def _block(lines: Iterable[str]) -> str:
  return "\n".join(["```", *(f"vera-jax {line}" for line in lines), "```"])


def _needs() -> str:
  rows = []
  for table, source in paper.SOURCES.items():
    cost = cost_of(source.sweeps)
    rows.append(
      [
        table,
        ", ".join(f"`{name}`" for name in source.weights),
        source.data,
        cost.plan,
        str(cost.runs),
        *(_hours(hours) for hours in cost.hours.values()),
      ]
    )
  header = ["", "weights", "data", "on v5e-8", "runs"]
  header += [f"chip-hours, {chip}" for chip in CHIPS]
  return markdown_table(header, rows, texts=4)


def _hours(hours: float) -> str:
  return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


@cache
def cost_of(sweeps: tuple[str, ...]) -> Cost:
  """An estimate for these sweeps together."""
  units: list[list[SweepRun]] = []
  for name in sweeps:
    config = paper.load(name)
    units += make_units(make_plan(config, "DIR").runs, most=config.members)
  products = sum(_products(run) for unit in units for run in unit)
  hours = {}
  for chip, (device, chips) in CHIPS.items():
    seconds = products / (SHARE * PEAK[device])
    seconds += len(units) * estimate.START * chips
    hours[chip] = seconds / 3600
  return Cost(hours, sum(map(len, units)), len(units), _split(units[0]))


def _split(unit: list[SweepRun]) -> str:
  """How a unit's runs lie on eight chips."""
  config = unit[0].config
  together = Together(len(unit), config.optim.batch_size)
  sizes = mesh_sizes(8, **config.mesh, together=together)
  named = zip(AXES, sizes, strict=True)
  return ", ".join(f"{axis}={n}" for axis, n in named if n > 1)


def _products(run: SweepRun) -> float:
  config = run.config
  source = str(config.data.source).lower()
  size = next(
    (x for name, x in SIZES.items() if name in (config.task, *_parts(source))),
    None,
  )
  if size and config.data.max_train_examples:
    size = size._replace(train=min(size.train, config.data.max_train_examples))
  return estimate.flops(config, size)


def _parts(source: str) -> Iterator[str]:
  return (name for name in SIZES if name in source)


def _rule() -> str:
  assert verdict.__doc__
  _, _, rule = verdict.__doc__.partition("\n\n")
  before, formula, after = rule.strip().split("\n\n")
  return f"{before}\n\n```\n{formula.strip()}\n```\n\n{after}"


def _expected() -> str:
  parts = []
  for table, some in groupby(cells(), key=lambda cell: cell.table):
    mine = [*some]
    columns = [*dict.fromkeys(cell.column for cell in mine)]
    rows: dict[str, dict[str, str]] = {}
    for cell in mine:
      rows.setdefault(cell.row, {})[cell.column] = _number(cell)
    if len(columns) > 2 * len(rows):  # a list rather than a table
      text = markdown_table(
        ["", "expected"],
        [[f"{c.row}: {c.column}", _number(c)] for c in mine],
      )
    else:
      text = markdown_table(
        ["", *columns],
        [
          [row, *(found.get(c, "") for c in columns)]
          for row, found in rows.items()
        ],
      )
    parts.append(f"**{table}**, {paper.SOURCES[table].shows}\n\n{text}")
  return "\n\n".join(parts)


def _number(cell: Cell) -> str:
  text = cell.printed
  if cell.counted is not None and cell.measure == "parameters":
    return f"{text}: {cell.counted:,}"
  if cell.spread is not None:
    allowed = tolerance_of(cell, cell.spread, cell.runs)
    text += f" ± {cell.spread}, ≤ {allowed:.1f}"
  return text


def _contradictions() -> str:
  lines = [
    f"- {cell.table}, {cell.row}, {cell.column}: printed {cell.printed};"
    f" {reason}."
    for cell in cells()
    if (reason := contradiction(cell))
  ]
  return "\n".join(lines)


def _choices() -> str:
  rows = []
  for choice in open_choices.CHOICES:
    value = choice.value
    if isinstance(value, dict):
      value = tuple(f"{key}: {x}" for key, x in value.items())
    words = map(str, value if isinstance(value, tuple) else (value,))
    key = choice.key if " " in choice.key else f"`{choice.key}`"
    rows.append([key, ", ".join(words), choice.where, choice.why])
  return markdown_table(["", "ours", "bears on", "why"], rows, texts=4)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
