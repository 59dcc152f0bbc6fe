"""Fold an adapter into its base: a checkpoint that needs no adapter library.

  python -m experiments.merge --adapter=RUN/adapter --out=FOLDER
  python -m experiments.merge --adapter=… --out=… --dtype=bfloat16 --base=FOLDER

Writes config.json with the label names, the tokenizer's files and
model.safetensors, which transformers loads as a sequence classifier. The merged
weights are compared with the adapted model on probe texts first, in float32 and
in the type written; merge.json keeps the largest differences. Past their bound
nothing is written. The folder can also be a run's --config.model.name.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from vera_jax.errors import UserError

ADAPTER = flags.DEFINE_string(
  "adapter",
  None,
  "The adapter: a run's adapter/, or a hub id (owner/name[@revision]).",
)
OUT = flags.DEFINE_string("out", None, "The folder to write; new or empty.")
BASE = flags.DEFINE_string(
  "base", None, "The base's folder. Unset: what adapter.json names."
)
DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16", "float16"], "Type of the weights."
)


def main() -> None:
  if not ADAPTER.value or not OUT.value:
    raise UserError("Say what to merge, and where to: --adapter=DIR --out=DIR")
  from vera_jax.adapters.files import load_adapter  # after the flags' errors
  from vera_jax.models.classifier import restore_adapter
  from vera_jax.models.export_hf import refuse_used, write_merged

  refuse_used(OUT.value)  # before the base is loaded
  classifier = restore_adapter(load_adapter(ADAPTER.value), BASE.value)
  about = write_merged(classifier, OUT.value, dtype=DTYPE.value)
  table = Table(title=f"merged and adapted on {about['probes']} probe texts")
  table.add_column("weights")
  table.add_column("largest logit difference", justify="right")
  table.add_column("bound", justify="right")
  for kind, difference in about["differences"].items():
    table.add_row(kind, f"{difference:.2e}", f"{about['bounds'][kind]:.2e}")
  console = Console()
  console.print(table)
  console.print(OUT.value, markup=False, highlight=False)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
