"""What SuperGLUE's five configs share.

The paper has no SuperGLUE runs. Rates, rank and warm-up are those of its RTE
(Table 8), whose texts SuperGLUE's RTE has too; epochs and lengths are ours, and
nothing is tuned. `minilm` is configs/minilm.py on these tasks, for two CPU
cores.
"""

from ml_collections import ConfigDict

from configs import common, minilm

SOURCE = "aps/super_glue"  # or a folder of SuperGLUE's files


def superglue(
  task: str, size: str, *, epochs: dict[str, int], max_length: int
) -> ConfigDict:
  """A task's config; `epochs` is by size, texts are cut at `max_length`."""
  common.pick(size, **{name: {} for name in epochs})
  name = f"superglue_{task}"
  if size == "minilm":
    config = minilm.get_config(name)
    config.optim.epochs = epochs[size]
  else:
    rates = {
      "base": dict(vera_lr=4e-3, head_lr=1e-2, lora_lr=5e-4),
      "large": dict(vera_lr=2e-2, head_lr=2e-3, lora_lr=4e-4),
    }
    config = common.glue(name, size, epochs=epochs[size], **rates[size])
  config.data.source = SOURCE
  config.data.max_length = max_length
  return config
