"""PEFT's adapter_config.json: each refusal; which layers it means."""

import pytest

from tests.peft_io.folders import (
  LORA,
  QUERY,
  RANK,
  VERA,
  WIDE,
  matrices,
  pair,
  vectors,
)
from vera_jax.errors import UserError
from vera_jax.peft_io.settings import PeftSettings, is_target

REFUSED = [
  ({"bias": "all"}, "bias='all'"),
  ({"fan_in_fan_out": True}, "set it to false"),
  ({"peft_type": "OFT"}, "peft_type is 'OFT'; only VERA, PVERA, LORA"),
  ({"peft_type": "IA3"}, "projection_prng_key=7: train it again"),
  ({"task_type": "CAUSAL_LM"}, "task_type='CAUSAL_LM'"),
  ({"new_trick": 3}, "new_trick=3"),
  ({"r": "four"}, "r='four'"),
  ({"r": 5}, "r = 5 need"),
  ({"layers_to_transform": [0]}, "leaves out bert.encoder.layer.1"),
  ({"target_modules": ["key", "query", WIDE]}, "self.key"),
  ({"target_modules": "*query"}, "regular expression"),
  ({"target_modules": "((.|[a-z.])+)+[QX]"}, "takes too long"),
  ({"d_initial": float("nan")}, "can't be read as JSON"),
  ({"r": 10**30}, "r=1000000"),
  ({"projection_prng_key": float("inf")}, "can't be read as JSON"),
  ({"target_modules": 3}, "unusable value"),
  ({"target_modules": ["query", 3]}, "names of modules"),
  ({"modules_to_save": [["score"]]}, "names of modules"),
]
REFUSED_LORA = [
  ({"lora_alpha": 1e30}, "lora_alpha=1e+30"),
  ({"use_dora": True}, "lacks magnitude_m of bert.encoder.layer"),
  ({"lora_bias": True}, "lora_bias=True"),
  ({"rank_pattern": {"query": 8}}, "rank_pattern"),
  ({"alpha_pattern": {"query": 8}}, "alpha_pattern"),
  ({"init_lora_weights": "pissa"}, "changed the base's weights"),
  ({"loftq_config": {"loftq_bits": 4}}, "quantised"),
  ({"use_qalora": True}, "quantised"),
  ({"trainable_token_indices": [1]}, "trainable_token_indices"),
  ({"layer_replication": [[0, 1]]}, "layer_replication"),
]


@pytest.mark.parametrize(
  "tensors, config, changes, words",
  [
    *((vectors() | pair(), VERA, *case) for case in REFUSED),
    *((matrices(), LORA, *case) for case in REFUSED_LORA),
  ],
)
def test_refused(carry, tensors, config, changes, words):
  with pytest.raises(UserError) as error:
    carry(tensors, config, **changes)
  assert words in str(error.value)


def test_patterns_that_change_nothing_are_fine(carry):
  same = {"rank_pattern": {"query": RANK}, "alpha_pattern": {"query": 6}}
  assert carry(matrices(), LORA, **same)[0]["settings"]["rank"] == RANK


LAYER = "bert.encoder.layer.{}.{}"
OUTER, INNER = (
  {LAYER.format(i, f"{name}.dense") for i in (0, 1)}
  for name in ("output", "attention.output")
)
QUERIES = {LAYER.format(i, QUERY) for i in (0, 1)}
SECOND = {LAYER.format(1, QUERY)}


@pytest.mark.parametrize(
  "settings, adapted",
  [
    ({"targets": ("output.dense",)}, OUTER | INNER),
    (
      {"targets": ("output.dense",), "exclude": ("attention.output.dense",)},
      OUTER,
    ),
    (
      {"targets": r".*layer\.1\.output\.dense"},
      {LAYER.format(1, "output.dense")},
    ),
    ({"targets": ("query",), "layers": (1,)}, SECOND),
    (
      {"targets": ("query",), "layers": (1,), "layers_pattern": ("blocks",)},
      set(),
    ),
    # a whole name is taken whatever the layers
    ({"targets": tuple(QUERIES), "layers": (1,)}, QUERIES),
    (
      {"targets": ("classifier",), "modules_to_save": ("classifier",)},
      set(),
    ),
  ],
)
def test_targets_as_peft_finds_them(settings, adapted):
  known = PeftSettings("lora", {}, "lora", base=None, **settings)
  names = OUTER | INNER | QUERIES | {"classifier"}
  assert {name for name in names if is_target(known, name)} == adapted
