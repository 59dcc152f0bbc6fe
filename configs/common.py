"""What all GLUE configs share; a task's own file changes a few lines.

Any key can be set on the command line: --config.optim.epochs=3,
--config.vera.targets="('query', 'key', 'value')".
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

SIZES = ("base", "large")


def get_config() -> ConfigDict:
  """Everything but the task and its settings."""
  config = ConfigDict()
  config.task = placeholder(str)  # to be set: a name in tasks/
  # vera | lora | ia3 | dora | dvora | lora_fa | onelora | pvera | randlora |
  # unilora | bitfit | norms | head | full, or a chain such as vera+bitfit. DoRA
  # takes LoRA's settings and rates, DVoRA VeRA's. In a chain each method has
  # its own settings, and all have the first one's rates.
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
  config.model.contraction = "auto"  # a plan in adapters/products.py

  config.data = ConfigDict()
  config.data.source = "nyu-mll/glue"  # a hub id, or a folder of GLUE's files
  config.data.max_length = 512  # tokens; longer texts are cut
  config.data.max_train_examples = placeholder(int)  # unset: all
  config.data.subset_seed = 0  # which ones, where they are not all
  config.data.cache_dir = ""  # tokenised data; unset: ~/.cache/vera_jax

  config.optim = ConfigDict()
  config.optim.epochs = placeholder(int)  # to be set
  config.optim.batch_size = 64
  config.optim.microbatch_rows = placeholder(int)  # per microbatch; unset: all
  config.optim.adapter_lr = placeholder(float)  # unset: the method's own lr
  config.optim.head_lr = placeholder(float)  # unset: the method's own
  config.optim.warmup_ratio = 0.06
  config.optim.weight_decay = 0.0  # not given in the paper
  config.optim.grad_clip = placeholder(float)  # global norm; unset: none
  config.optim.patience = placeholder(int)  # epochs without a better score

  config.vera = ConfigDict()
  config.vera.rank = 1024
  config.vera.d_init = 0.1
  config.vera.init = "kaiming_uniform"  # or a name in projections.INITIALISERS
  config.vera.projection_seed = 0
  config.vera.train = "both"  # both | d | b
  config.vera.sharing = "shared"  # shared | unique: a pair for each layer
  config.vera.conv = "whole"  # | taps: a d for each position of a window
  config.vera.targets = ("query", "value")  # patterns over the ends of paths
  config.vera.lr = placeholder(float)  # to be set
  config.vera.head_lr = placeholder(float)  # to be set

  config.lora = ConfigDict()
  config.lora.rank = 8
  config.lora.alpha = 8.0
  config.lora.scaling = "rank"  # alpha / rank | root: alpha / sqrt(rank)
  config.lora.targets = ("query", "value")
  config.lora.lr = 4e-4
  config.lora.head_lr = 4e-4

  # LoRA whose A stays random, and VeRA of ones: each one matrix or vector per
  # layer, and rates of ours, untuned, as are all of those below.
  config.lora_fa = ConfigDict()
  config.lora_fa.rank = 8
  config.lora_fa.alpha = 8.0
  config.lora_fa.scaling = "rank"
  config.lora_fa.projection_seed = 0
  config.lora_fa.targets = ("query", "value")
  config.lora_fa.lr = 4e-3
  config.lora_fa.head_lr = 4e-3
  config.onelora = ConfigDict({"targets": ("query", "value")})
  config.onelora.lr = 4e-4
  config.onelora.head_lr = 4e-3

  config.pvera = ConfigDict()
  config.pvera.rank = 256
  config.pvera.d_init = 0.1
  config.pvera.init = "kaiming_uniform"
  config.pvera.projection_seed = 0
  config.pvera.targets = ("query", "value")
  config.pvera.lr = 1e-2
  config.pvera.head_lr = 4e-3

  config.randlora = ConfigDict()
  config.randlora.rank = 32
  config.randlora.alpha = 640.0  # PEFT's: 20 times the rank
  config.randlora.init = "uniform"  # | peft
  config.randlora.projection_seed = 0
  config.randlora.targets = ("query", "value")
  config.randlora.lr = 1e-3
  config.randlora.head_lr = 4e-3

  config.unilora = ConfigDict()
  config.unilora.rank = 4
  config.unilora.size = 4096  # trained numbers in all
  config.unilora.theta_init = 0.02
  config.unilora.projection_seed = 42  # PEFT's
  config.unilora.targets = ("query", "value")
  config.unilora.lr = 4e-3
  config.unilora.head_lr = 4e-3

  # Keys, values and what enters the feed-forward's output layer, as each family
  # names it.
  config.ia3 = ConfigDict()
  inputs = r"layer(_\d+)?/output/dense|lin2|mlp/Wo"  # scaled, not the outputs
  config.ia3.targets = ("key", "value", inputs)
  config.ia3.feedforward = (inputs,)
  config.ia3.lr = 1e-2
  config.ia3.head_lr = 4e-3

  config.bitfit = ConfigDict({"lr": 1e-3, "head_lr": 1e-3})
  config.bitfit.biases = ".*"  # a pattern of the layers: query|value
  config.norms = ConfigDict({"lr": 1e-3, "head_lr": 1e-3})
  config.head = ConfigDict({"head_lr": placeholder(float)})
  config.full = ConfigDict({"lr": 2e-5, "head_lr": 2e-5})

  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  config.eval_batch_size = 128
  config.predict_test = False  # write GLUE's submission files
  config.log = ConfigDict()
  config.log.every = 10  # steps between lines of metrics.jsonl
  config.log.wandb = ""  # a Weights & Biases project
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
    config.optim.batch_size = 32  # section 4.1; Table 8 says 32 on each of 4
    config.vera.rank = 256
    config.lora.alpha = 16.0
  return config


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
