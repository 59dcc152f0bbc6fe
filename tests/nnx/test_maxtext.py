"""MaxText trains and saves an adapter of ours, looped and scanned."""

import os

# MaxText's own way to do without Google Cloud's libraries.
os.environ["DECOUPLE_GCLOUD"] = "TRUE"

import jax
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from flax.traverse_util import flatten_dict

import vera_jax
import vera_jax.nnx

pytest.importorskip(
  "maxtext", reason="requirements-maxtext.txt is not installed"
)
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore"),  # of MaxText's dependencies
]
LAYOUTS = {  # and the shape of d
  "looped": (["scan_layers=False"], (256,)),
  "first axis": (["param_scan_axis=0"], (2, 256)),
  "second axis": ([], (256, 2)),  # which is MaxText's default
}
TINY = {
  "model_name": "default",
  "decoder_block": "llama2",
  "base_emb_dim": 16,
  "base_num_query_heads": 2,
  "base_num_kv_heads": 1,
  "head_dim": 8,
  "base_mlp_dim": 24,
  "base_num_decoder_layers": 2,
  "vocab_size": 32,
  "max_target_length": 8,
  "per_device_batch_size": 1,
  "dtype": "float32",
  "attention": "dot_product",
  "dataset_type": "synthetic",
  "eval_interval": -1,
  "checkpoint_period": 2,
  "learning_rate": 0.03,
  "learning_rate_schedule_steps": 4,
  "skip_jax_distributed_system": True,
  "log_config": False,
  "sharding_tolerance": 1.0,  # of a model as small, more is replicated
}


@pytest.fixture(autouse=True)
def maxtext_adds_arrays_of_different_ranks():
  with jax.numpy_rank_promotion("allow"):
    yield


def arguments(folder, layout, *, steps):
  from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

  given = {**TINY, "steps": steps, "base_output_directory": folder}
  given["run_name"] = "run"
  return [
    f"{MAXTEXT_CONFIGS_DIR}/post_train/sft.yml",
    *(f"{name}={value}" for name, value in given.items()),
    *LAYOUTS[layout][0],
  ]


def plain(folder, layout):
  """MaxText's model, and what calls one on tokens."""
  from maxtext.configs import pyconfig
  from maxtext.utils import model_creation_utils

  config = pyconfig.initialize(["", *arguments(folder, layout, steps=4)])
  model, mesh = model_creation_utils.from_pretrained(config)
  tokens = np.random.default_rng(0).integers(0, 32, (8, 8))

  def logits(model):
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
      return model(
        decoder_input_tokens=tokens,
        decoder_positions=np.tile(np.arange(8), (8, 1)),
        decoder_segment_ids=np.ones((8, 8), np.int32),
        enable_dropout=False,
      )

  return model, logits


def values(model):
  state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return {p: np.asarray(x) for p, x in flatten_dict(state).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_trainer_trains_saves_and_resumes_d_and_b_alone(tmp_path, layout):
  from examples.maxtext import sft

  trained = sft.main(arguments(tmp_path / "whole", layout, steps=4))
  model, logits = plain(tmp_path / "none", layout)
  base, expected = values(model), logits(model)
  adapted, after = logits(trained), values(trained)
  assert abs(adapted - expected).max() > 1e-3
  for path, value in base.items():
    np.testing.assert_array_equal(after[path], value)
  leaves = {path: x for path, x in after.items() if path not in base}
  assert len(leaves) == 2 * 2 * (2 if layout == "looped" else 1)
  shapes = {x.shape for p, x in leaves.items() if p[-1] == "vera_d"}
  assert shapes == {LAYOUTS[layout][1]}

  merged = vera_jax.nnx.merge(trained)
  assert type(merged) is type(model)
  np.testing.assert_allclose(logits(merged), adapted, rtol=3e-6, atol=3e-6)

  first = vera_jax.nnx.adapt(model, sft.ADAPTER, targets=sft.TARGETS)
  np.testing.assert_array_equal(logits(first), expected)
  for path, value in values(first).items():
    assert (path in leaves) == bool((after[path] != value).any()), path

  loaded = vera_jax.nnx.load(
    tmp_path / "whole/run/adapter", plain(tmp_path / "none", layout)[0]
  )
  np.testing.assert_array_equal(logits(loaded), adapted)

  sft.main(arguments(tmp_path / "parts", layout, steps=2))
  for _ in range(2):  # the second time it is finished
    resumed = sft.main(arguments(tmp_path / "parts", layout, steps=4))
    for path, value in leaves.items():
      np.testing.assert_array_equal(values(resumed)[path], value)


@pytest.mark.parametrize("name", ("unique", "held", "dora"))
def test_every_layer_of_a_scanned_model_is_adapted(tmp_path, name):
  """Matrices of each layer, one pair at the root, and whole weights."""
  model, logits = plain(tmp_path, "second axis")
  expected = logits(model)
  adapter = {
    "unique": vera_jax.vera(rank=8, sharing="unique"),
    "held": vera_jax.vera(rank=8),
    "dora": vera_jax.dora(rank=2),
  }[name]
  vera_jax.nnx.adapt(
    model,
    adapter,
    targets=["query", "key", "value", "out", "wi_.", "wo", "logits_dense"],
    projections="held" if name == "held" else "made",
  )
  np.testing.assert_array_equal(logits(model), expected)
  keys = nnx.Rngs(1)
  moved = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(keys.params(), x.shape),
    nnx.state(model, nnx.LoRAParam),
  )
  nnx.update(model, moved)
  adapted = logits(model)
  assert abs(adapted - expected).max() > 1e-2
  merged = logits(vera_jax.nnx.merge(model))
  scale = abs(adapted).max()
  np.testing.assert_allclose(merged, adapted, rtol=0, atol=3e-6 * scale)
