"""VeRA against a head alone, on generated data and a small encoder.

  python -m experiments.quickstart        (or: make quickstart)

Trains on generated entailment pairs, whose dev set holds words and patterns
that training never shows, and ends with a table. A few minutes on two cores;
run again, it shows the finished runs.
"""

from rich.table import Table

from configs import quickstart
from experiments import cli
from vera_jax.terminal import Console


def main() -> None:
  from vera_jax.train.loop import train_and_evaluate

  results = []
  for method in ("head", "vera"):
    config = quickstart.get_config()
    config.method = method
    results.append(train_and_evaluate(config, cli.default_workdir(config)))
  table = Table(title="Generated entailment, dev set (chance is 0.500)")
  table.add_column("method")
  for name in ("adapter parameters", "head parameters", "accuracy", "seconds"):
    table.add_column(name, justify="right")
  for result in results:
    table.add_row(
      {"head": "head alone", "vera": "VeRA"}[result["method"]],
      f"{result['parameters']['adapter']:,}",
      f"{result['parameters']['head']:,}",
      f"{result['best']['score']:.3f}",
      f"{result['seconds']:.0f}",
    )
  head, vera = (result["best"]["score"] for result in results)
  console = Console()
  console.print(table)
  frozen = results[0]["parameters"]["frozen"]
  console.print(
    f"VeRA is {100 * (vera - head):.1f} points above the head alone. The"
    f" encoder's {frozen / 1e6:.1f} M parameters stay frozen in both."
  )


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
