"""Memory, open files and threads of commands that run for long.

  python -m tests.growth            # docs/growth.md, growth.json, the figure
  python -m tests.growth --only=serving --scale=0.1 --out=FOLDER

Each command runs in a process of its own, on the tiniest models, and is looked
at from outside about a hundred times.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from tests.growth.programs import PROGRAMS
from tests.growth.samples import HELD, MOST, Sample, measure
from vera_jax.errors import UserError
from vera_jax.files import read_json, write_text
from vera_jax.results import provenance

OUT = flags.DEFINE_string("out", "docs", "Where growth.json and the page go.")
ONLY = flags.DEFINE_list("only", list(PROGRAMS), "Only these programs.")
SCALE = flags.DEFINE_float("scale", 1.0, "Of all counts.", 0.0)
UNITS = {"memory": ("MB", 1e6), "files": ("open files", 1)}
UNITS |= {"threads": ("threads", 1)}


def draw(rows: dict[str, Any], folder: Path) -> None:
  """A row of panels per program, a panel for each thing that is held."""
  from matplotlib import rc_context

  from vera_jax.report.style import BLUE, STYLE, grid, save

  with rc_context(STYLE):
    figure, axes = grid([1.25] * len(rows) * len(HELD), width=None, least=2)
    panels = iter(axes)
    for name, row in rows.items():
      samples = [Sample(*sample) for sample in row["samples"]]
      for held in HELD:
        ax, (unit, size) = next(panels), UNITS[held]
        values = [getattr(sample, held) / size for sample in samples]
        ax.plot([sample.done for sample in samples], values, color=BLUE)
        ax.axvspan(row["count"] / 2, row["count"], color="0.95", zorder=0)
        ax.set(
          xlim=(0, row["count"]),
          ylim=(0, 1.25 * max(values)),
          title=f"{name}: {row['growth'][held]:+.2%}",
          ylabel=unit,
          xlabel=row["what"],
        )
  save(figure, folder, "growth", ["png"])


def page(made: dict[str, Any]) -> str:
  columns = "program | count | seconds | MB | files | threads".split(" | ")
  columns += ["MB more", "files more", "threads more"]
  header = f"| {' | '.join(columns)} |\n| --- | --- |" + " ---: |" * 7
  lines = []
  for name, row in made["programs"].items():
    last = Sample(*row["samples"][-1])
    grown = " | ".join(f"{row['growth'][held]:+.2%}" for held in HELD)
    lines.append(
      f"| {name} | {row['count']:,} {row['what']} | {row['seconds']:.0f} |"
      f" {last.memory / 1e6:.0f} | {last.files} | {last.threads} | {grown} |"
    )
  grown = ", ".join(grown_in(made["programs"])) or "nothing"
  table, jax = "\n".join(lines), made["versions"]["jax"]
  return f"""# Growth

For those whose runs and servers stay up.

What a command holds while it runs for long: memory of its own, open files and
threads. The last three columns say by what share each is more at the end than
in the middle, on a straight line through the second half whose slope is the
median of those between any two samples. At most {MOST:.0%} is allowed; beyond
it: {grown}.

Written by `{made["command"]}` on {made["cores"]} CPU cores, beside other work;
jax {jax}.

{header}
{table}

![Memory, open files and threads over each program's count](figures/growth.png)

- **Training** evaluates and saves every 500 steps, **evaluating** every ten.
- **Predicting** and **writing** read a file of as many lines.
- **Serving** answers eight clients at once, at most 20 requests in a second.
  Three in ten requests are streams, one of which is left after its first bytes;
  one in ten names an adapter that there is not; one replaces an adapter by
  itself from its folder.
- The models are tiny, so that what is lost in a step shows beside them: the
  classifier has two layers of width 16, the decoder two of width 8.
- What grows in **evaluating** are saves: alone in a process each leaves 11 kB.
  Four of them are JSON values that tensorstore (0.1.75 to 0.1.86) gives orbax
  and never frees; where the rest is was not found. `train/checkpoint.py` has it
  not asked for its metrics, which were 18 kB more.
- `growth.json` has all samples. A short form is part of `make test-all`.
"""


def grown_in(rows: dict[str, Any]) -> list[str]:
  """What has grown by more than it may."""
  return [
    f"{name}'s {held}"
    for name, row in rows.items()
    for held, share in row["growth"].items()
    if share > MOST
  ]


def write(out: Path, rows: dict[str, Any]) -> None:
  """All files, after each program: they take long."""
  scale = f" --scale={SCALE.value:g}" if SCALE.present else ""
  made = {
    "command": f"python -m tests.growth{scale}",
    "cores": os.cpu_count(),
    "programs": rows,
    **provenance(),
  }
  out.mkdir(parents=True, exist_ok=True)
  write_text(out / "growth.json", json.dumps(made) + "\n")
  write_text(out / "growth.md", page(made))
  draw(rows, out / "figures")


def main() -> None:
  unknown = [name for name in ONLY.value if name not in PROGRAMS]
  if unknown:
    raise UserError(f"--only={unknown[0]}: choose from {', '.join(PROGRAMS)}.")
  out = Path(OUT.value)
  file = out / "growth.json"
  rows = read_json(file)["programs"] if file.exists() else {}
  with tempfile.TemporaryDirectory() as folder:
    for name in ONLY.value:
      program = PROGRAMS[name]
      rows[name] = measure(Path(folder, name), program, scale=SCALE.value)
      grown = (f"{k} {x:+.2%}" for k, x in rows[name]["growth"].items())
      print(f"{name}, {rows[name]['seconds']} s:", *grown, flush=True)
      rows = {name: rows[name] for name in PROGRAMS if name in rows}
      write(out, rows)
  if too_much := grown_in(rows):
    names = ", ".join(too_much)
    raise UserError(f"More than {MOST:.0%} was grown: {names}.")


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
