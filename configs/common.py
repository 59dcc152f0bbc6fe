"""What all GLUE configs share; a task's own file changes a few lines.

Any key can be set on the command line: --config.optim.epochs=3,
--config.vera.targets="('query', 'key', 'value')".
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from configs import open_choices
from vera_jax.adapters.methods import add_groups

SIZES = ("base", "large")


def get_config() -> ConfigDict:
  """Everything but the task and its settings."""
  config = ConfigDict()
  config.task = placeholder(str)  # to be set: a name in tasks/
  # As docs/methods.md names it, or a chain such as vera+bitfit, in which each
  # method has its own settings, and all have the first one's rates.
  config.method = "vera"
  config.seed = 0  # of dropout, batch order and new leaves

  config.model = ConfigDict()
  config.model.name = "roberta-base"  # a hub id, or a folder
  config.model.dtype = "auto"  # float32 on CPU, else bfloat16
  # Stacked layers, of which one is compiled, or looped ones: true | false |
  # auto, by device and depth.
  config.model.scan = FieldReference("auto", field_type=object)
  config.model.remat = "none"  # none | full | dots: memory against time
  # The frozen kernels: none | keep (a GGUF file's own codes) | int8 | nf4 |
  # bfloat16.
  config.model.quantise = "none"
  config.model.contraction = "auto"  # auto | factored | folded | folded_forward

  config.data = ConfigDict()
  config.data.source = "nyu-mll/glue"  # a hub id, or a folder of GLUE's files
  config.data.max_length = 512  # tokens; longer texts are cut
  config.data.max_train_examples = placeholder(int)  # unset: all
  config.data.subset_seed = 0  # which ones, where they are not all
  config.data.cache_dir = ""  # tokenised data; unset: ~/.cache/vera_jax

  config.optim = ConfigDict()
  config.optim.epochs = placeholder(int)  # to be set
  config.optim.batch_size = 64  # examples of a step
  config.optim.microbatch_rows = placeholder(int)  # per microbatch; unset: all
  # Unset: the method's own lr. auto: by the rule of docs/rates.md.
  config.optim.adapter_lr = FieldReference(None, field_type=object)
  config.optim.head_lr = placeholder(float)  # unset: the method's own
  config.optim.warmup_ratio = 0.06  # the share of steps in which rates rise
  # AdamW's, of the trained leaves
  config.optim.weight_decay = open_choices.WEIGHT_DECAY.value
  config.optim.grad_clip = placeholder(float)  # global norm; unset: none
  config.optim.grad_clip = open_choices.GRAD_CLIP.value
  config.optim.patience = placeholder(int)  # epochs without a better score

  add_groups(config)  # each method's settings, which --help lists
  config.vera.rank = 1024

  # Sizes of the mesh's axes. data, fsdp or tensor may be -1: what is left over.
  # runs splits the runs of an ensemble, -1: as a step is fastest.
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "runs": -1})
  config.eval_batch_size = 128  # examples that are scored together
  config.predict_test = False  # write GLUE's submission files
  config.log = ConfigDict()
  config.log.every = 10  # steps between lines of metrics.jsonl
  config.log.wandb = ""  # a Weights & Biases project
  config.log.profile = ""  # FIRST:LAST, the steps of a trace: --profile
  return config


def glue(
  task: str,
  size: str,
  *,
  epochs: int,
  vera_lr: float,
  head_lr: float,
  lora_lr: float,
) -> ConfigDict:
  """A task's config on RoBERTa-base or -large, by the paper's Table 8.

  LoRA's rate, for adapter and head alike, is that of its own paper (Table 9
  there); it trains as many epochs as VeRA does.
  """
  config = get_config()
  config.task = task
  config.model.name = f"roberta-{size}"
  config.optim.epochs = epochs
  config.vera.lr = vera_lr
  config.vera.head_lr = config.head.head_lr = head_lr
  config.lora.lr = config.lora.head_lr = lora_lr
  if size == "large":
    config.data.max_length = 128
    config.optim.batch_size = open_choices.LARGE_BATCH.value
    config.vera.rank = 256
    config.lora.alpha = 16.0
  return config


def of_ours(folder: str) -> str:
  """A folder of data that comes with the project, by its name in a checkout.

  Where the package is installed, and at work in another folder, by its path.
  """
  path = Path(folder)
  return folder if path.is_dir() else str(Path(__file__).parents[1] / path)


def put_on(config: ConfigDict, targets: tuple[str, ...]) -> None:
  """Every method that is put on layers is put on these."""
  for group in config.values():
    if isinstance(group, ConfigDict) and "targets" in group:
      group.targets = targets


def pick(size: str, **columns: dict[str, Any]) -> dict[str, Any]:
  """A size's column of Table 8."""
  if size not in columns:
    raise ValueError(f"the config has no {size!r}, only {', '.join(columns)}")
  return columns[size]
