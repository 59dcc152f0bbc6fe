"""Score against trained parameters, by rank: the paper's Figure 2.

  python -m experiments.sweep --config=configs/sweeps/rank.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/rank.py:minilm ...

RTE on RoBERTa-large: VeRA with r in {1, 4, 16, 64, 256, 1024}, LoRA with r in
{1, 2, 4, ..., 64}, five seeds. LoRA's alpha stays as it is while r changes, as
its own paper does it. Expected: the figure's claim is that at equal numbers of
parameters VeRA is four points above LoRA; its values are not printed anywhere.
Not run by us, for want of RoBERTa's weights.

minilm: SST-2, 1,200 training sentences in batches of 16, three seeds, three
epochs; every second of LoRA's ranks.

superglue: the same ranks and seeds on SuperGLUE's five tasks, RoBERTa-large,
each task by configs/superglue/TASK.py:large. The paper has no such study; not
run by us.

superglue_small: CB and COPA on MiniLM, five epochs, three of each method's
ranks, three seeds. With SuperGLUE's files, or others of their form, in
FOLDER/CB and FOLDER/COPA:

  python -m experiments.sweep --config=configs/sweeps/rank.py:superglue_small \\
    --workdir=DIR --config.base.data.source=FOLDER
"""

import importlib

from ml_collections import ConfigDict

from configs import common, minilm, rte
from configs.sweeps import (
  FEWER,
  SEEDS,
  Overrides,
  cross,
  difference,
  product,
  seeds,
  sweep,
)

VERA = (1, 4, 16, 64, 256, 1024)
LORA = (1, 2, 4, 8, 16, 32, 64)
SUPERGLUE = ("boolq", "cb", "copa", "rte", "wic")


def get_config(size: str = "large") -> ConfigDict:
  known = ("base", "large", "minilm", "superglue", "superglue_small")
  common.pick(size, **{name: {} for name in known})
  if size == "superglue":
    runs = cross(_ranks(VERA, LORA), seeds(SEEDS))
    return _superglue("large", SUPERGLUE, runs)
  if size == "superglue_small":
    ranks = _ranks((1, 16, 256), (1, 4, 16))
    return _superglue("minilm", ("cb", "copa"), cross(ranks, seeds(FEWER)))
  if size == "minilm":
    title = "Rank (the paper's Figure 2), MiniLM"
    runs = cross(_ranks(VERA, LORA[::2]), seeds(FEWER))
    return sweep(title, minilm.brief(), runs)
  runs = cross(_ranks(VERA, LORA), seeds(SEEDS))
  return sweep("Rank (the paper's Figure 2)", rte.get_config(size), runs)


def _ranks(vera: tuple[int, ...], lora: tuple[int, ...]) -> Overrides:
  return product({"method": ("vera",), "vera.rank": vera}) + product(
    {"method": ("lora",), "lora.rank": lora}
  )


def _superglue(
  size: str, names: tuple[str, ...], runs: Overrides
) -> ConfigDict:
  """The runs on each of these tasks, by the tasks' own configs."""
  configs = [
    importlib.import_module(f"configs.superglue.{name}").get_config(size)
    for name in names
  ]
  if size == "minilm":
    for config in configs:
      config.optim.epochs = 5
  tasks = [
    {"task": config.task, **difference(configs[0], config)}
    for config in configs
  ]
  model = {"large": "RoBERTa-large", "minilm": "MiniLM"}[size]
  title = f"Rank on SuperGLUE, {model}"
  return sweep(title, configs[0], cross(tasks, runs))
