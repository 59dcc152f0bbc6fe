"""Fold an adapter into its base: a checkpoint that needs no adapter library.

  python -m experiments.merge --adapter=RUN/adapter --out=FOLDER
  python -m experiments.merge --adapter=… --out=… --dtype=bfloat16 --base=FOLDER
  python -m experiments.merge --adapter=… --out=FILE.gguf --format=gguf-q8_0
  python -m experiments.merge --model=FOLDER --out=FILE.gguf --format=gguf-f16

Writes config.json with the label names, the tokenizer's files and
model.safetensors, which transformers loads under the family's own class: a
classifier of texts, words or images, or a decoder. The merged
weights are compared with the adapted model on probe texts first, in float32 and
in the type written; merge.json keeps the largest differences. Past their bound
nothing is written. The folder can also be a run's --config.model.name.

A decoder can be written as one GGUF file instead, for llama.cpp and its
relatives, or a folder that was merged before (--model). --config.model.name
takes such a file too. Formats of fewer than eight bits are refused: they would
round away what the adapter learned (docs/gguf.md).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.table import Table

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.places import place
from vera_jax.terminal import Console

MODEL = cli.define_model(
  "In place of an adapter: a merged folder to write as GGUF."
)
OUT = flags.DEFINE_string(
  "out", None, "The folder to write, new or empty; or the new GGUF file."
)
DTYPE = flags.DEFINE_string(
  "dtype", "float32", "Type of the weights: float32, bfloat16 or float16."
)
FORMAT = flags.DEFINE_string(
  "format",
  "safetensors",
  "safetensors (a folder), or one file: gguf-f32, gguf-f16, gguf-bf16 or"
  " gguf-q8_0.",
)

cli.define_json()


def main() -> None:
  MODEL.named()  # one of them is
  if not OUT.value:
    raise UserError("Say what to merge, and where to: --adapter=DIR --out=DIR")
  if FORMAT.value != "safetensors":
    write_as_gguf(place(OUT.value))
    return
  if MODEL.model.value:
    raise UserError("--model is for --format=gguf-f16 and its like.")
  # after the flags' errors
  cli.say_importing()
  from vera_jax.export.hf import check_dtype, write_merged
  from vera_jax.files import check_free

  check_dtype(DTYPE.value)
  check_free(OUT.value)  # before the base is loaded
  about = write_merged(MODEL.load(), OUT.value, dtype=DTYPE.value)
  cli.give({"out": OUT.value, **about})
  show(about)
  Console().print(OUT.value)


def write_as_gguf(out: Path) -> None:
  """Write --model, or the merged --adapter, as one file."""
  cli.say_importing()
  from vera_jax.export import gguf as export_gguf  # after the flags' errors
  from vera_jax.models.gguf_file import refuse_there

  kind = FORMAT.value
  export_gguf.check_kind(kind)
  refuse_there(out)  # before the base is loaded
  if merged_before := MODEL.model.value:
    formats = export_gguf.write_gguf_of(merged_before, out, kind=kind)
  else:
    about, formats = export_gguf.write_merged_gguf(MODEL.load(), out, kind=kind)
    show(about)
  cli.give({"out": str(out), "tensors": formats})
  stored = ", ".join(f"{count} in {name}" for name, count in formats.items())
  Console().print(f"{out}: tensors {stored}")


def show(about: Mapping[str, Any]) -> None:
  """The largest differences between merged and adapted model, as a table."""
  table = Table(title=f"merged and adapted on {about['probes']} probes")
  table.add_column("weights")
  table.add_column("largest logit difference", justify="right")
  table.add_column("bound", justify="right")
  for kind, difference in about["differences"].items():
    table.add_row(kind, f"{difference:.2e}", f"{about['bounds'][kind]:.2e}")
  Console().print(table)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
