"""A decoder learns to write sentences in E2E's form, on two cores.

  python -m experiments.e2e_demo        (or: make e2e)

VeRA on SmolLM2-135M, with rows that experiments/make_e2e.py generated: no
benchmark. Prints what people (here: templates) wrote for some inputs, what the
model writes before and after training, and the scores. Run again, it continues
what was interrupted, and shows the finished runs.
"""

from rich.table import Column, Table

from configs import e2e
from experiments import cli
from vera_jax.errors import UserError
from vera_jax.tasks.e2e_metrics import METRICS
from vera_jax.terminal import Console

SHOWN = 4  # inputs


def main() -> None:
  from vera_jax.data.written import FOLDER, read_written
  from vera_jax.train.loop import train_and_evaluate

  console = Console()
  before, after = (e2e.get_config("generated") for _ in range(2))
  # The identity: VeRA's b starts at zero, and stays there at this rate.
  before.optim.adapter_lr, before.data.max_train_examples = 0.0, 8
  runs = {
    "Before: the model as it is writes texts": before,
    "After: VeRA trains, then the model writes again": after,
  }
  results, texts = [], []
  for title, config in runs.items():
    console.print(f"\n{title}", style="bold")
    workdir = cli.default_workdir(config)
    results.append(train_and_evaluate(config, workdir))
    if not results[-1]["test"]["inputs"]:
      raise UserError(results[-1]["test"]["missing"])
    texts.append(read_written(workdir))

  untuned, tuned = texts
  console.print("\nWhat was written for some of the inputs", style="bold")
  for one, references in list(tuned.references.items())[:SHOWN]:
    table = Table(title=one, title_justify="left", show_header=False)
    for said in references:
      table.add_row("reference", said)
    table.add_row("before", untuned.outputs[one] or "(nothing)")
    table.add_row("after", tuned.outputs[one] or "(nothing)")
    console.print(table)
  table = Table(
    f"{results[0]['test']['inputs']} inputs",
    *(Column(name, justify="right") for name in ("before", "after")),
  )
  scores = [result["test"]["scores"] for result in results]
  for name in METRICS:
    if name in scores[0]:
      table.add_row(name, *(f"{run[name]:.4f}" for run in scores))
  console.print(table)
  if missing := results[0]["test"]["missing"]:
    console.print(missing)
  console.print(f"All of its texts: {workdir / FOLDER}")


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
