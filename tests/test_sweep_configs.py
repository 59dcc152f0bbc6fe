"""Every study builds, says how it is run, and holds the paper's settings."""

import importlib
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs.sweeps import (
  SEEDS,
  combinations,
  images,
  instruct,
  layers,
  single,
)
from vera_jax import Target, adapter_size, find_targets
from vera_jax.adapters.labels import count
from vera_jax.adapters.methods import make_adapter, settings_in
from vera_jax.adapters.sites import matches
from vera_jax.models.bert import BertClassifier, BertConfig
from vera_jax.models.family import read_fields
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.sweep.plan import make_plan, make_units

FOLDER = Path(__file__).resolve().parents[1] / "configs/sweeps"
ROWS = "instruct_data/alpaca_en_demo.json"
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"__init__"})
# Runs in the paper's size and in the small one.
COUNTS = {
  ("glue", "base"): 6 * 2 * 5,
  ("glue", "large"): 6 * 2 * 5,
  ("glue", "gain"): 3 * 5,
  ("glue", "minilm"): 2 * 3 * 5,
  ("glue", "cola"): 2 * 3,
  ("rank", "large"): 13 * 5,
  ("rank", "minilm"): 10 * 3,
  ("rank", "superglue"): 5 * 13 * 5,
  ("rank", "superglue_small"): 2 * 6 * 3,
  # of Table 7's rows the shared one is Table 6's default, on two tasks
  ("ablations", "large"): (2 * 8 + 4 + 2) * 5,
  ("ablations", "minilm"): 9 * 3,
  ("layers", "large"): 10 * 5,
  ("layers", "minilm"): 10 * 3,
  ("single", "large"): 2 * 2 * 3 * 5,
  ("single", "minilm"): 2 * 3 * 3,
  ("rates", "minilm"): 2 * 5 * 2,
  ("rate_rule", "minilm"): 7 * 5 * 2,
  ("rate_rule", "dinov2"): 4 * 5 * 2,
  ("rate_rule", "smollm2"): 4 * 5 * 2,
  ("data", "study"): 5 * 5 * 3,
  ("data", "rates"): 5 * 3 * 2 + 6,
  ("data", "pairs"): 7 + 3 + 3,
  ("data", "own_pairs"): 4,
  ("data", "limit_rates"): 4 + 3 + 4,
  ("data", "limits"): 5 * 3,
  ("methods", "minilm"): 11 * 5,
  ("methods", "rates"): 44 * 2,
  ("methods", "cola"): 6 * 3,
  ("combinations", "minilm"): 4 * 5,
  ("combinations", "rates"): 13 * 2,
  ("networks", "images"): 5 * 2 * 3,
  ("networks", "rates"): 5 * 6 * 2,
  ("networks", "shot_rates"): 6 + 4 * 4,
  ("networks", "texts"): 1 + 5 * 3,
  ("networks", "text_rates"): 4 + 2 * 5 + 2 * 6,
  ("initialisers", "minilm"): 7 * 3 * 5,
  ("initialisers", "draws"): 4 * 3 * 5,
  ("initialisers", "rates"): (5 * 3 + 2 * 4) * 2,
  ("images", "methods"): 5 * 5,
  ("images", "shots"): 3 * 3 * 3,
  ("images", "rates"): (2 * 3 + 3 * 4) * 2,
  ("images", "shot_rates"): 2 * 4 + 3,
  ("example", "generated"): 4 * 3,
  ("example", "sst2"): 3 * 3,
  # no tuning, asked in two ways; VeRA of two ranks and LoRA
  ("e2e", "smollm2"): 2 + 3 * 3,
  ("e2e", "rates"): 3 * 4,
  ("e2e", "medium"): 2 * 3,
  ("e2e", "large"): 2 * 3,
  **{("images", part): 4 * 3 for part in images.PAPER},
  **{("instruct", part): 2 for part in instruct.PAPER},
  ("instruct", "memory"): 2 * 3,
  # no tuning; VeRA, DVoRA and LoRA
  ("instruct", "smollm2"): 2 * (1 + 3 * 3),
  ("instruct", "rates"): 2 * 11 + 5,
}


def load(name, variant):
  return importlib.import_module(f"configs.sweeps.{name}").get_config(variant)


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", COUNTS)
def test_every_run_of_a_study(name, variant, tmp_path):
  plan = make_plan(load(name, variant), tmp_path)
  assert len(plan.runs) == COUNTS[name, variant]
  assert max(map(len, make_units(plan.runs, most=8))) <= 8


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


@pytest.fixture(scope="module")
def paths():
  """Every dense layer of a looped encoder of six layers."""
  config = BertConfig("roberta", 10, 16, 6, 2, 64, 16, pad_token_id=1)
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return list(find_targets(BertClassifier(config, 2, scan=False), (".*",), ids))


def matched(paths, patterns):
  return [p for p in paths if any(matches(x, p) for x in patterns)]


def test_which_layers_are_adapted(paths):
  counts = [len(matched(paths, patterns)) for patterns in layers.targets(6)]
  assert counts == [12, 36, *[6] * 6, 6, 6]
  lower, upper = (set(matched(paths, x)) for x in layers.targets(6)[-2:])
  assert not lower & upper
  numbers = {int(path[1].removeprefix("layer_")) for path in lower}
  assert numbers == {0, 1, 2}


@pytest.mark.parametrize("size", single.WIDTHS)
def test_one_layer_and_equally_many_parameters(size, paths, tmp_path):
  width, last = single.WIDTHS[size], single.LAST[size]
  chosen, sizes = set(), Counter()
  for run in make_plan(load("single", size), tmp_path).runs:
    settings = run.config[run.config.method].to_dict()
    adapter, patterns = make_adapter(run.config.method, settings)
    chosen.add(tuple(patterns))
    one = {("layer",): Target(width, width)}
    sizes[run.config.method, adapter_size(adapter, one)] += 1
  ours, theirs = (
    Counter({n: c for (m, n), c in sizes.items() if m == method})
    for method in ("vera", "lora")
  )
  assert ours == theirs
  ((pattern,),) = chosen
  found = matched(paths, (pattern.replace(str(last), "5"),))
  assert found == [("encoder", "layer_5", "attention", "self", "value")]


@pytest.mark.parametrize(
  "name, variant, source, results",
  [
    ("methods", "minilm", "parts/study", "methods"),
    ("methods", "rates", "parts/rates", "method_rates"),
    ("combinations", "minilm", "parts/study", "combinations"),
    ("initialisers", "minilm", "parts/study", "initialisers"),
    ("initialisers", "rates", "parts/rates", "initialiser_rates"),
    ("initialisers", "draws", "parts/study", "initialiser_draws"),
    ("data", "study", "parts/study", "data"),
    ("data", "rates", "parts/rates", "data_rates"),
    ("data", "pairs", "glue_data", "data_pairs"),
    ("data", "own_pairs", "parts/rates", "data_own_pairs"),
    ("data", "limit_rates", "parts/rates", "data_limit_rates"),
    ("data", "limits", "parts/study", "data_limits"),
    ("e2e", "smollm2", "e2e_data", "e2e"),
    ("instruct", "smollm2", ROWS, "instruct"),
    ("instruct", "rates", ROWS, "instruct_rates"),
    ("networks", "images", "cifar10_data", "networks"),
    ("networks", "rates", "cifar10_data", "network_rates"),
    ("networks", "shot_rates", "cifar10_data", "network_shot_rates"),
    ("networks", "texts", "e2e_data", "network_texts"),
    ("networks", "text_rates", "e2e_data", "network_text_rates"),
  ],
)
def test_the_documented_command_finds_the_committed_runs(
  name, variant, source, results, tmp_path
):
  """Their names end in a digest of all settings, also of ones added since."""
  config = load(name, variant)
  config.base.data.source = source
  runs = {run.name for run in make_plan(config, tmp_path).runs}
  there = Path(__file__).parents[1] / "results/sweeps" / results / "runs"
  assert runs == {path.name for path in there.iterdir()}


def test_combinations_have_equal_counts(minilm_folder, tmp_path):
  plan = make_plan(load("combinations", "minilm"), tmp_path)
  found = []
  for run in plan.runs[:: len(SEEDS)]:
    config, method = run.config, run.config.method
    settings = settings_in(config, method)
    made = blueprint(
      read_fields(minilm_folder), outputs=2, method=method, settings=settings
    )
    own, _ = made.own_shapes()
    shapes = unflatten_dict(made.shapes | flatten_dict(own))
    found.append(count(shapes, made.label(shapes)).adapter)
  assert found == [combinations.NUMBERS] * 4
