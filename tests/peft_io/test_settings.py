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

REFUSED = {
  "bias": ({"bias": "all"}, "bias='all'"),
  "fan_in_fan_out": ({"fan_in_fan_out": True}, "set it to false"),
  "method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
  "task": ({"task_type": "CAUSAL_LM"}, "task_type='CAUSAL_LM'"),
  "unknown field": ({"new_trick": 3}, "new_trick=3"),
  "rank": ({"r": "four"}, "r='four'"),
  "other rank": ({"r": 5}, "r = 5 need"),
  "layers": ({"layers_to_transform": [0]}, "leaves out bert.encoder.layer.1"),
  "targets": ({"target_modules": ["key", "query", WIDE]}, "self.key"),
  "expression": ({"target_modules": "*query"}, "regular expression"),
  "type": ({"target_modules": 3}, "unusable value"),
}
REFUSED_LORA = {
  "dora": ({"use_dora": True}, "use_dora=True: DoRA"),
  "bias": ({"lora_bias": True}, "lora_bias=True"),
  "ranks": ({"rank_pattern": {"query": 8}}, "rank_pattern"),
  "alphas": ({"alpha_pattern": {"query": 8}}, "alpha_pattern"),
  "pissa": ({"init_lora_weights": "pissa"}, "changed the base's weights"),
  "loftq": ({"loftq_config": {"loftq_bits": 4}}, "quantised"),
  "qalora": ({"use_qalora": True}, "quantised"),
  "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
  "replicated": ({"layer_replication": [[0, 1]]}, "layer_replication"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(carry, case):
  changes, words = REFUSED[case]
  with pytest.raises(UserError) as error:
    carry(vectors() | pair(), VERA, **changes)
  assert words in str(error.value)


@pytest.mark.parametrize("case", REFUSED_LORA)
def test_lora_refused(carry, case):
  changes, words = REFUSED_LORA[case]
  with pytest.raises(UserError) as error:
    carry(matrices(), LORA, **changes)
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
  known = PeftSettings(method="lora", rank=RANK, base=None, **settings)
  names = OUTER | INNER | QUERIES | {"classifier"}
  assert {name for name in names if is_target(known, name)} == adapted
