"""Settings that can't work are refused, all in one message."""

import pytest

from configs import common, rte
from vera_jax.errors import UserError
from vera_jax.train.config import check_settings


def test_what_must_be_set_is_named():
  config = common.get_config()
  with pytest.raises(UserError) as caught:
    check_settings(config)
  assert str(caught.value).endswith(
    "config.task, config.optim.epochs, config.vera.lr, config.vera.head_lr."
  )
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
