"""GGUF files for llama.cpp, Ollama and their relatives, and adapters from them.

  python -m experiments.gguf export --adapter=RUN/adapter --out=adapter.gguf
  python -m experiments.gguf export --adapter=… --out=model.gguf --as=merged
  python -m experiments.gguf export --model=FOLDER --out=model.gguf --type=q8_0
  python -m experiments.gguf import --adapter=a.gguf --base=FOLDER --out=DIR

An adapter that is a LoRA, as VeRA is exactly, becomes a file that is put on its
base: llama-cli -m BASE.gguf --lora adapter.gguf, or ADAPTER in Ollama's
Modelfile. Its rank is VeRA's, or the smaller width of a layer; --truncate cuts
it, and says what is lost. --as=merged writes the whole model with the adapter
folded in instead, as experiments.merge does, and --model a folder that was
merged before.
"""

from pathlib import Path

from absl import flags

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.places import local_copy, place

MODEL = cli.define_model("export: in place of an adapter, a whole model.")
OUT = flags.DEFINE_string("out", None, "The new file; import: the new folder.")
AS = flags.DEFINE_enum(
  "as", "lora", ["lora", "merged"], "export: beside its base, or folded in."
)
TYPE = flags.DEFINE_enum(
  "type",
  None,
  ["f32", "f16", "bf16", "q8_0"],
  "export: of the matrices. Unset: f32 of an adapter, f16 of a model.",
)
TRUNCATE = flags.DEFINE_integer(
  "truncate", None, "export: cut an adapter to this rank.", lower_bound=1
)
MAX_RANK = flags.DEFINE_integer(
  "max_rank",
  None,
  "export: refuse ranks above this one, if your server has a limit (vLLM 512;"
  " llama.cpp has none).",
  lower_bound=1,
)

cli.define_json()


def main(words: list[str]) -> None:
  if words not in (["import"], ["export"]):
    raise UserError("Say import or export; --help shows how.")
  source, out = MODEL.named(), OUT.value  # an adapter or a model
  if not out:
    raise UserError("Say where to: --out.")
  model = MODEL.model.value
  if words == ["import"]:
    if model or not MODEL.base.value:
      raise UserError("An adapter needs its base: --adapter=FILE --base=FOLDER")
    if any(x.value is not None for x in (TYPE, TRUNCATE, MAX_RANK)):
      raise UserError("--type, --truncate and --max_rank are for export.")
    cli.say_importing()
    from vera_jax.peft_io.gguf import import_gguf_adapter

    about = import_gguf_adapter(source, place(out), base=MODEL.base.value)
    cli.give({"out": out, **about})
    rank, count = about["settings"]["rank"], about["parameters"]["adapter"]
    print(f"{out}: lora, rank {rank}, {count:,} numbers")
  elif AS.value == "merged" or model:
    write_model(model, place(out))
  else:
    write_adapter(source, out)


def write_model(model: str | None, out: Path) -> None:
  """Write --model, or the merged --adapter, as one file."""
  if TRUNCATE.value or MAX_RANK.value:
    raise UserError("--truncate and --max_rank are for --as=lora.")
  cli.say_importing()
  from vera_jax.export.gguf import write_gguf_of, write_merged_gguf
  from vera_jax.models.gguf_file import refuse_there

  kind = f"gguf-{TYPE.value or 'f16'}"
  refuse_there(out)  # before the base is loaded
  if model:
    formats = write_gguf_of(model, out, kind=kind)
  else:
    _, formats = write_merged_gguf(MODEL.load(), out, kind=kind)
  cli.give({"out": str(out), "tensors": formats})
  stored = ", ".join(f"{count} in {name}" for name, count in formats.items())
  print(f"{out}: tensors {stored}")


def write_adapter(adapter: str, out: str) -> None:
  """Write --adapter as LoRA."""
  if TYPE.value == "q8_0":
    raise UserError("An adapter is small: --type=f32, f16 or bf16.")
  cli.say_importing()
  from vera_jax.peft_io.gguf import export_gguf_adapter

  about = export_gguf_adapter(
    local_copy(adapter),
    out,
    base=MODEL.base.value,
    format=(TYPE.value or "f32").upper(),
    truncate=TRUNCATE.value,
    max_rank=MAX_RANK.value,
  )
  cli.give({"out": out, **about})
  print(f"{out}: {about['modules']} modules, rank {about['rank']}")
  if TRUNCATE.value:
    print(
      f"Of a module's change of weights at most {about['lost']:.2%} is lost"
      " (Frobenius norm)."
    )


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
