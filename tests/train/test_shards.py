"""One all-reduce per step, in float32, of what is trained and the loss."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from configs import instruct
from configs.common import get_config
from experiments.plans.collectives import collectives
from experiments.plans.lowering import abstract_step
from experiments.plans.tasks import planned_task
from vera_jax.errors import UserError
from vera_jax.models import known_shapes
from vera_jax.pretrained.sharding import make_mesh
from vera_jax.train.shards import ONE, divide, shards_of

FIELDS = {
  "model_type": "roberta",
  "vocab_size": 24,
  "hidden_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "intermediate_size": 32,
  "max_position_embeddings": 16,
}
# compiles in a third of the time
QUIET = {
  **FIELDS,
  "hidden_dropout_prob": 0.0,
  "attention_probs_dropout_prob": 0.0,
}


def config_of(method, *, plan="auto", remat="none") -> ConfigDict:
  config = get_config()
  config.task, config.method = "rte", method
  config.model.contraction, config.model.remat = plan, remat
  config.model.scan = True
  config.vera.rank, config.lora.rank = 8, 2
  config.vera.lr = config.vera.head_lr = config.head.head_lr = 1e-2
  return config


def sent(config, sizes, *, fields=QUIET, dtype="float32"):
  """The collectives of the compiled step, and the bytes that are trained."""
  mesh = make_mesh(**sizes)
  step = abstract_step(config, fields, mesh, dtype=jnp.dtype(dtype))
  compiled = step.compile(rows=8, length=8, slots=2)
  trained = sum(leaf.size * 4 for leaf in jax.tree.leaves(step.state.params))
  return collectives(compiled.as_text()), trained


@pytest.mark.parametrize(
  "method, settings, also",
  [
    ("vera", {"plan": "folded_forward"}, {"fields": FIELDS}),
    pytest.param(
      "vera",
      {"plan": "folded", "remat": "full"},
      {"dtype": "bfloat16"},
      marks=pytest.mark.slow,
    ),
    pytest.param("full", {}, {}, marks=pytest.mark.slow),
  ],
)
def test_pure_data_parallelism_sends_the_gradients_once(method, settings, also):
  (only,), trained = sent(config_of(method, **settings), {"data": 8}, **also)
  assert only.kind == "all-reduce" and only.types == ("f32",)
  assert only.times == 1 and not only.looped
  assert only.bytes == trained + 8  # the loss, and the number of examples


def test_under_fsdp_kernels_are_gathered_and_gradients_sent_once():
  found, trained = sent(config_of("vera"), {"data": 2, "fsdp": 4})
  (reduced,) = [one for one in found if one.kind == "all-reduce"]
  assert reduced.bytes == trained + 8 and not reduced.looped
  gathered = [one for one in found if one.kind == "all-gather" and one.looped]
  kernels = {16 * 16 * 4, 16 * 32 * 4}
  assert gathered and {one.bytes for one in gathered} <= kernels


def test_a_decoders_step_on_a_mesh_gathers_no_more_than_it_multiplies_with():
  """The head once; of kernels the parts that `tensor` leaves; and what layers
  keep of a row of eight tokens is four on each device."""
  fields = known_shapes.llama(16, 32, 3, 4, vocab_size=96)
  config = instruct.get_config("smollm2")
  config.model.scan, config.model.remat = True, "full"
  config.vera.rank = 8
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  step = abstract_step(config, fields, mesh, task=planned_task(config))
  text = step.compile(rows=4, length=8, slots=8).as_text()
  found, table = collectives(text), 96 * 16 * 4 // 2
  (head,) = (x for x in found if x.bytes == table)
  assert (head.kind, head.times, head.group) == ("all-gather", 1, 2)
  looped = [x for x in found if x.kind == "all-gather" and x.looped]
  assert looped and max(x.bytes for x in looped) <= 16 * 32 * 4 // 2
  assert "f32[3,1,1,4,16]" in text and "f32[3,1,1,8,16]" not in text


def test_leaves_that_fsdp_splits_are_added_over_it_at_once():
  mesh = make_mesh(2, 2, 2)
  split = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
  whole = NamedSharding(mesh, PartitionSpec())
  assert shards_of([whole]).number == 4
  assert shards_of([split, whole]).number == 2
  assert shards_of([SingleDeviceSharding(jax.devices()[0])]) == ONE
  behind = shards_of([split, whole], front=1).behind(whole, 1)
  assert behind.spec == PartitionSpec(None, ("data",))


def test_rows_that_do_not_divide_are_refused():
  shards = shards_of([NamedSharding(make_mesh(8), PartitionSpec())])
  with pytest.raises(UserError, match="12 rows do not divide over 8"):
    divide({"x": jnp.zeros((12, 3))}, shards)
