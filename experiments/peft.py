"""Adapters to and from PEFT's format, without torch.

  python -m experiments.peft import --adapter=PEFT_DIR --out=OUR_DIR
  python -m experiments.peft export --adapter=OUR_DIR --out=PEFT_DIR --as=lora

VeRA, PVeRA, LoRA, DoRA, RandLoRA, Uni-LoRA and IA3 go both ways; any VeRA
adapter is also a LoRA adapter of the same rank, exactly (--as=lora), and so are
PVeRA's mean, Uni-LoRA and, with use_dora, DVoRA. --base names the base where
the adapter's own name for it is not found. For a server that takes no such rank
--max_rank refuses the adapter, and --truncate cuts it and says what is lost.
"""

from absl import flags

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.places import place

ADAPTER = flags.DEFINE_string(
  "adapter", None, "The folder to read, or a hub id."
)
OUT = flags.DEFINE_string("out", None, "The folder to write.")
BASE = flags.DEFINE_string(
  "base", None, "The base, a folder or a hub id; unset: the adapter says it."
)
AS = flags.DEFINE_enum(
  "as",
  None,
  ["vera", "pvera", "lora", "randlora", "unilora", "ia3"],
  "export: PEFT's method; unset: the adapter's.",
)
TASK = flags.DEFINE_string(
  "task", None, "import: the task's name, for the names of the labels."
)
MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  None,
  "import: tokens that longer texts are cut at. Unset: as our own export knew"
  " it, else the model's room, for PEFT's files do not say it.",
)
TRUNCATE = flags.DEFINE_integer(
  "truncate", None, "export --as=lora: cut to this rank.", lower_bound=1
)
MAX_RANK = flags.DEFINE_integer(
  "max_rank",
  None,
  "export --as=lora: refuse ranks above this one, if your server has a limit"
  " (vLLM 512).",
  lower_bound=1,
)

cli.define_json()


def main(words: list[str]) -> None:
  if words not in (["import"], ["export"]):
    raise UserError(
      "Say import or export: vera-jax peft import --adapter=FOLDER --out=FOLDER"
    )
  if not ADAPTER.value or not OUT.value:
    raise UserError("--adapter and --out are needed.")
  # Imported only now: a mistake in the flags is reported without the wait.
  cli.say_importing()
  from vera_jax.adapters.files import adapter_folder
  from vera_jax.peft_io import export_adapter, import_adapter

  folder, out = adapter_folder(ADAPTER.value), place(OUT.value)
  if words == ["export"]:
    warnings, lost = export_adapter(
      folder,
      out,
      method=AS.value,
      base=BASE.value,
      truncate=TRUNCATE.value,
      max_rank=MAX_RANK.value,
    )
    cli.give({"out": OUT.value, "warnings": warnings, "lost": lost})
    for warning in warnings:
      cli.complain(f"Warning: {warning}")
    if TRUNCATE.value:
      print(
        f"Of a module's change of weights at most {lost:.2%} is lost (Frobenius"
        " norm)."
      )
  else:
    about = import_adapter(
      folder,
      out,
      base=BASE.value,
      task=TASK.value,
      max_length=MAX_LENGTH.value,
    )
    cli.give({"out": OUT.value, **about})
    settings, size = about["settings"], about["parameters"]["adapter"]
    rank = f" rank {settings['rank']}," if "rank" in settings else ""
    text = f"{about['method']},{rank} {size:,} numbers on "
    text += ", ".join(settings["targets"])
    if settings.get("init") == "stored":
      text += "; no key gives its projections, so they are kept in the file"
    elif "init" in settings:
      text += (
        f"; projections: {settings['init']}, {settings['projection_seed']}"
      )
    print(text)
  print(OUT.value)


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
