"""Settings that can't work are refused, all in one message."""

import pytest
from ml_collections import ConfigDict

from configs import common, rte
from vera_jax.errors import UserError
from vera_jax.train.config import check_settings
from vera_jax.train.setup import build_setup


def test_what_must_be_set_is_named():
  config = common.get_config()
  with pytest.raises(UserError) as caught:
    check_settings(config)
  fields, tasks = str(caught.value).splitlines()
  assert fields.endswith(
    "config.task, config.optim.epochs, config.vera.lr, config.vera.head_lr."
  )
  assert tasks.startswith("The tasks are: cola, ")
  config.task, config.optim.epochs = "rte", 1
  config.method = "lora"
  check_settings(config)  # VeRA's rates aren't asked for
  config.method, config.optim.head_lr = "head", 1e-3
  check_settings(config)


@pytest.mark.parametrize(
  "key",
  [
    "optim.epochs",
    "optim.batch_size",
    "optim.patience",
    "eval_batch_size",
    "log.every",
  ],
)
def test_zero_is_too_small(key):
  config = rte.get_config()
  config.update_from_flattened_dict({key: 0})
  with pytest.raises(UserError, match=f"config.{key} is 0"):
    check_settings(config)


def test_an_unknown_method_is_refused():
  config = rte.get_config()
  config.method = "dara"
  with pytest.raises(UserError, match="'dara'; choose from vera, lora"):
    check_settings(config)


def test_a_chain_needs_the_rates_of_its_first_method():
  config = rte.get_config()
  config.vera.lr = config.vera.head_lr = None
  for config.method in ("bitfit+vera", "dora", "ia3"):
    check_settings(config)
  for config.method in ("vera+bitfit", "dvora"):
    with pytest.raises(UserError, match="config.vera.lr, config.vera.head_lr"):
      check_settings(config)
  config.method = "vera+head"
  with pytest.raises(UserError, match="head adds nothing to a chain"):
    check_settings(config)


def test_all_that_is_wrong_is_in_one_message():
  config = rte.get_config()
  config.task = None
  config.update_from_flattened_dict({"optim.batch_size": 0, "log.every": -1})
  with pytest.raises(UserError) as caught:
    check_settings(config)
  for words in ("config.task", "batch_size is 0", "config.log.every is -1"):
    assert words in str(caught.value)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"optim.grad_clip": 0.0}, "grad_clip is 0.0; a norm above 0"),
    ({"optim.grad_clip": -1.0}, "grad_clip is -1.0"),
    ({"optim.warmup_ratio": 1.5}, "warmup_ratio is 1.5; it is a share"),
    ({"optim.adapter_lr": -0.1}, "optim.adapter_lr is -0.1; it must be"),
    ({"optim.adapter_lr": "best"}, "adapter_lr is 'best'; a number, or auto"),
    ({"optim.adapter_lr": True}, "adapter_lr is True; a number, or auto"),
    (
      {"method": "dvora", "optim.adapter_lr": "auto"},
      "no rule is known for dvora, only for vera and lora. Give",
    ),
    (
      {"method": "vera+bitfit", "optim.adapter_lr": "auto"},
      "no rule is known for vera\\+bitfit",
    ),
    (
      {"vera.init": "uniform", "optim.adapter_lr": "auto"},
      "vera.init is uniform, vera.train both. Give a number",
    ),
    (
      {"vera.d_init": 1.0, "optim.adapter_lr": "auto"},
      "vera.d_init is 1, and where d starts at 1 the rule's rates",
    ),
    ({"vera.head_lr": -0.1}, "config.vera.head_lr is -0.1"),
    ({"optim.head_lr": float("nan")}, "head_lr is nan; it must be a finite"),
    ({"optim.weight_decay": -1.0}, "weight_decay is -1.0"),
    ({"seed": -1}, "config.seed is -1; choose a whole number from 0"),
    ({"seed": 2**32}, "config.seed is 4294967296"),
    ({"data.subset_seed": -1}, "data.subset_seed is -1"),
    ({"data.max_train_examples": 0}, "max_train_examples is 0"),
    ({"vera.projection_seed": 2**32}, "projection_seed=4294967296"),
    ({"vera.projection_seed": -1}, "0 or above"),
    ({"vera.targets": ("que(",)}, "pattern 'que\\(' is no proper regular"),
    ({"vera.rank": 0}, "vera's rank is 0"),
    ({"vera.init": "zeros"}, "init is 'zeros'; choose from"),
    ({"model.scan": "some"}, "model.scan is 'some'; choose auto, true or"),
    ({"model.dtype": "float16"}, "dtype is float16; choose auto, float32, b"),
    ({"model.remat": "some"}, "remat is some; choose none, full, dots"),
    ({"optim.schedule": "sine"}, "schedule is sine; choose linear, cosine"),
    ({"optim.eps": 0.0}, "optim.eps is 0.0; a finite number above 0"),
    ({"mesh.fsdp": 0}, "config.mesh.fsdp is 0; 1 or more is needed"),
    ({"model.contraction": "best"}, "contraction is 'best'; choose auto"),
    (
      {"method": "lora", "model.contraction": "folded_forward"},
      "no folded_forward plan for .*: its delta's first matrix",
    ),
  ],
)
def test_what_would_fail_or_train_nonsense_is_refused(changes, words):
  config = rte.get_config()
  config.optim.eps, config.optim.schedule = 1e-8, "linear"  # as some have them
  check_settings(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=words):
    check_settings(config)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"optim": None}, "lacks config.optim.epochs, .*configs/rte.py"),
    ({"seed": None}, "config.seed is None; a whole number is needed"),
    ({"seed": 1.5}, "config.seed is 1.5; a whole number is needed"),
    ({"seed": True}, "config.seed is True; a whole number"),
    ({"optim.epochs": "3", "task": 3}, "(?s)task is 3; a text.*epochs is '3'"),
    ({"optim.warmup_ratio": None}, "warmup_ratio is None; a number"),
    ({"mesh.data": "all"}, "mesh.data is 'all'; a whole number"),
    ({"predict_test": 1}, "predict_test is 1; True or False"),
  ],
)
def test_a_config_of_ones_own_has_what_all_have(changes, words):
  config = rte.get_config()
  with config.ignore_type():
    for key, value in changes.items():
      *groups, last = key.split(".")
      group = config
      for name in groups:
        group = group[name]
      group[last] = value
  with pytest.raises(UserError, match=words):
    check_settings(config)
  with pytest.raises(UserError, match="lacks config.task"):
    check_settings(ConfigDict())


def test_the_limits_themselves_are_allowed():
  config = rte.get_config()
  config.update_from_flattened_dict(
    {"optim.warmup_ratio": 1.0, "optim.adapter_lr": 0.0, "seed": 2**32 - 1}
  )
  check_settings(config)


def test_a_task_that_measures_no_general_texts_refuses_them():
  config = rte.get_config()
  with config.unlocked():
    config.data.general = "a.txt"
  with pytest.raises(UserError, match="rte measures no loss of general texts"):
    build_setup(config)
