"""Every study builds, says how it is run, and holds the paper's settings."""

import importlib
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs.sweeps import layers, single
from vera_jax import adapter_size, find_targets
from vera_jax.methods import make_adapter
from vera_jax.models.bert import BertClassifier, BertConfig
from vera_jax.sweep import estimate
from vera_jax.sweep.plan import make_plan, units

FOLDER = Path(__file__).resolve().parents[1] / "configs/sweeps"
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"__init__"})
# Runs in the paper's size and in the small one.
COUNTS = {
  ("glue", "base"): 6 * 2 * 5,
  ("glue", "large"): 6 * 2 * 5,
  ("glue", "minilm"): 2 * 3 * 3,
  ("rank", "large"): 13 * 5,
  ("rank", "minilm"): 13 * 3,
  # of Table 7's rows the shared one is Table 6's default, on two tasks
  ("ablations", "large"): (2 * 8 + 4 + 2) * 5,
  ("ablations", "minilm"): 9 * 3,
  ("layers", "large"): 10 * 5,
  ("layers", "minilm"): 10 * 2,
  ("single", "large"): 2 * 2 * 3 * 5,
  ("single", "minilm"): 2 * 3 * 3,
  ("example", "generated"): 4 * 3,
  ("example", "sst2"): 4 * 3,
}


def load(name, variant):
  return importlib.import_module(f"configs.sweeps.{name}").get_config(variant)


@pytest.mark.parametrize("name, variant", COUNTS)
def test_every_run_of_a_study(name, variant, tmp_path):
  plan = make_plan(load(name, variant), tmp_path)
  assert len(plan.runs) == COUNTS[name, variant]
  assert max(map(len, units(plan.runs, members=8))) <= 8


def test_all_studies_are_listed():
  assert {name for name, _ in COUNTS} == set(NAMES)
  for name in NAMES:
    module = importlib.import_module(f"configs.sweeps.{name}")
    assert f"--config=configs/sweeps/{name}.py" in module.__doc__
    default = module.get_config().to_json()
    assert default in [load(n, v).to_json() for n, v in COUNTS if n == name]
    with pytest.raises(ValueError, match="no 'huge'"):
      module.get_config("huge")


def test_the_papers_settings_are_the_tasks_own(tmp_path):
  plan = make_plan(load("glue", "large"), tmp_path)
  for run in plan.runs:
    task, method, seed = run.config.task, run.config.method, run.config.seed
    own = importlib.import_module(f"configs.{task}").get_config("large")
    own.method, own.seed = method, seed
    assert run.config.to_dict() == own.to_dict()
  seeds = Counter((r.config.task, r.config.method) for r in plan.runs)
  assert set(seeds.values()) == {5}


def test_the_ranks_of_figure_2(tmp_path):
  plan = make_plan(load("rank", "large"), tmp_path)
  ranks = {"vera": set(), "lora": set()}
  for run in plan.runs:
    ranks[run.config.method].add(run.config[run.config.method].rank)
    assert run.config.task == "rte"
  assert ranks["vera"] == {1, 4, 16, 64, 256, 1024}
  assert ranks["lora"] == {1, 2, 4, 8, 16, 32, 64}


def encoder(layers, width):
  return BertClassifier(
    BertConfig.from_dict(
      {
        "model_type": "roberta",
        "vocab_size": 10,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 16,
      }
    ),
    2,
    scan=False,
  )


@pytest.mark.parametrize("size", layers.LAYERS)
def test_which_layers_are_adapted(size):
  depth = layers.LAYERS[size]
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  model = encoder(depth, 16)
  counts = [
    len(find_targets(model, patterns, ids))
    for patterns in layers.targets(depth)
  ]
  assert counts == [2 * depth, 6 * depth, *[depth] * 6, depth, depth]
  lower, upper = (
    set(find_targets(model, patterns, ids))
    for patterns in layers.targets(depth)[-2:]
  )
  assert not lower & upper


@pytest.mark.parametrize("size", single.WIDTHS)
def test_one_layer_and_equally_many_parameters(size, tmp_path):
  plan = make_plan(load("single", size), tmp_path)
  width, last = single.WIDTHS[size], single.LAST[size]
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  model = encoder(last + 1, width)
  sizes = Counter()
  for method, rank in {
    (r.config.method, r.config[r.config.method].rank) for r in plan.runs
  }:
    config = next(r.config for r in plan.runs if r.config.method == method)
    settings = {**config[method].to_dict(), "rank": rank}
    adapter, patterns = make_adapter(method, settings)
    targets = find_targets(model, patterns, ids)
    assert len(targets) == 1
    sizes[adapter_size(adapter, targets)] += 1
  assert set(sizes.values()) == {2}  # VeRA's and LoRA's


def test_the_small_studies_fit_an_evening(tmp_path):
  """About 80 minutes on the two idle cores that the rate was measured on."""
  rate = estimate.rate([])
  total = 0.0
  for name, variant in COUNTS:
    if variant == "minilm":
      plan = make_plan(load(name, variant), tmp_path)
      found = units(plan.runs, members=8)
      total += sum(rate.seconds(r.config for r in unit) for unit in found)
  assert total < 80 * 60
