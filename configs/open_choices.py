"""What the paper leaves open, and what we chose: the one place to change it.

The configs take their values from here; `docs/reproduce.md` lists them. For one
run or sweep, a setting is changed on the command line as any other:
--config.base.optim.weight_decay=0.01.
"""

from typing import Any, NamedTuple


class Choice(NamedTuple):
  """A setting that the paper doesn't give.

  Attributes:
    key: of a run's config; in words where it is no setting.
    value: ours.
    where: the tables that it bears on.
    why: where it comes from.
  """

  key: str
  value: Any
  where: str
  why: str


SEEDS = Choice(
  "seed", tuple(range(5)), "GLUE", "the paper has five and doesn't name them"
)
REPEATS = Choice(
  "seed", (0, 1, 2), "Tables 3, 5, 12", "how many runs isn't said"
)
ONE = Choice("seed", (0,), "Tables 4, 13", "one run, judged on 80 questions")
EPOCH = Choice(
  "the epoch that counts",
  {"Table 5": "last"},
  "Table 5",
  "the best one would be chosen on the test images; the paper has the best"
  " epoch for GLUE and the last one for E2E",
)
TURN = Choice(
  "the turn that is judged", 1, "Tables 4, 13", "as VB-LoRA's authors read it"
)
WEIGHT_DECAY = Choice(
  "optim.weight_decay",
  0.0,
  "GLUE, Tables 4, 12, 13",
  "given for E2E and images alone",
)
GRAD_CLIP = Choice("optim.grad_clip", None, "all", "not mentioned")
LARGE_BATCH = Choice(
  "optim.batch_size",
  32,
  "RoBERTa-large",
  "section 4.1; Table 8 has 32 on each of 4 GPUs",
)
D_INIT = Choice(
  "vera.d_init", 0.1, "Tables 3, 4, 5, 12, 13", "the paper's for GLUE"
)
LENGTH_PENALTY = Choice(
  "generate.length_penalty", 0.8, "Table 3", "LoRA's code; its paper has 0.9"
)
IMAGE_WARMUP = Choice("optim.warmup_ratio", 0.06, "Table 5", "GLUE's")
IMAGE_BATCH = Choice(
  "optim.batch_size", 20, "Table 5", "no batch size is given"
)
QUANTISE = Choice(
  "model.quantise", "nf4", "Tables 4, 12, 13", 'QLoRA\'s; "quantized" there'
)
LENGTH = Choice("data.max_length", 512, "Tables 4, 12, 13", "QLoRA's")
TEMPLATE = Choice("data.template", "alpaca", "Tables 4, 12, 13", "of the data")
HELD_OUT = Choice(
  "data.dev_examples", 2000, "Tables 4, 12, 13", "rows that aren't trained on"
)
LORA_ALPHA = Choice(
  "lora.alpha", 16.0, "Tables 4, 12, 13", "QLoRA's; no alpha is given"
)
CHOICES = [value for value in [*globals().values()] if type(value) is Choice]
