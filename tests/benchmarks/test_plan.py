"""A plan reads programs rightly, finds the largest batch, speaks clearly."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import meshes
from benchmarks.step import column_bias
from experiments.plans import chips, depth, figures, report
from experiments.plans.collectives import collectives
from experiments.plans.lowering import abstract_step
from experiments.plans.search import largest
from vera_jax.errors import UserError
from vera_jax.pretrained.sharding import make_mesh

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "results/plans").glob("roberta*.json"))
# What a TPU's program has and the CPU's does not.
TPU = """HloModule step

%body.1 (p: (f32[4])) -> (f32[4]) {
  %g = (bf16[2,8]{1,0:T(8,128)(2,1)}, bf16[2,64]{1,0}) all-gather-start(%x), replica_groups=[2,8]<=[16], dimensions={1}
  %r = f32[4]{0:T(256)} reduce-scatter(%y), replica_groups={{0,1,2},{3,4,5}}, to_apply=%add
  ROOT %t = (f32[4]) tuple(%r)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (f32[4]) while(%i), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"11"}}
  %s = (f32[4]{0}, pred[9]{0}) all-reduce(%a, %b), to_apply=%add
  ROOT %o = f32[4] get-tuple-element(%w), index=0
}
"""  # noqa: E501


def test_collectives_in_a_tpus_program():
  gathered, scattered, reduced = collectives(TPU)
  assert gathered == ("all-gather", ("bf16",), 2 * 64 * 2, 11, True)
  assert scattered == ("reduce-scatter", ("f32",), 3 * 16, 11, True)
  assert reduced == ("all-reduce", ("f32", "pred"), 16 + 9, 1, False)


def test_what_a_loop_sends_counts_once_per_iteration():
  rows = NamedSharding(make_mesh(8), PartitionSpec("data"))
  x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=rows)

  def body(x, _):
    return jnp.tanh(x @ x.T @ x), None

  step = jax.jit(lambda x: jax.lax.scan(body, x, length=5)[0])
  found = collectives(step.lower(x).compile().as_text())
  assert {(one.times, one.looped) for one in found} == {(5, True)}


@pytest.mark.smoke
@pytest.mark.parametrize("most", [0, 1, 2, 7, 100, 1000])
@pytest.mark.parametrize("start", [1, 16])
def test_the_largest_batch_is_found_in_few_tries(most, start):
  """Memory with a jump, as where XLA chooses another layout."""
  tries = []

  def use(rows):
    tries.append(rows)
    jump = 500 if rows > 40 else 0
    return 1000 + 37 * rows + jump

  room = 1000 + 37 * most + (500 if most > 40 else 0)
  got = largest(use, room, start=start)
  assert got <= most < got + max(2, 0.126 * got + 1)
  assert len(tries) == len(set(tries)) and len(tries) <= 8


def test_without_libtpu_it_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(UserError, match=f"v5e:2x2 needs .* {chips.INSTALL}"):
    chips.describe_pod("v5e:2x2")


@pytest.mark.smoke
def test_the_division_of_fewest_flops():
  """Of those that fit; of equal ones, to rounding, that of most parts."""

  def made(runs, flops, fits=True):
    return {"mesh": {"runs": runs}, "flops": {"a_chip": flops}, "fits": fits}

  methods = {"a": made(1, 2.001e12), "b": made(4, 2.0e12), "c": made(2, 3e12)}
  assert report.leanest(methods) == "b"
  assert report.leanest(methods | {"b": made(4, 0, False)}) == "a"


@pytest.mark.slow
def test_the_plan_of_a_compiled_step(tiny_roberta):
  """On eight CPU devices: gradients, loss and count are sent in one sum."""
  config = meshes.config_of("vera")
  config.model.name, config.data.max_length = str(tiny_roberta), 8
  pod = chips.Pod("cpu", jax.devices(), "cpu", 2**30)
  made = figures.plan(config, pod, rows=9, search=False)
  assert (made["rows"], made["rows_a_chip"], made["compiles"]) == (16, 2, 3)
  trained = made["parameters"]["adapter"] + made["parameters"]["head"]
  assert made["collectives"] == [
    {
      "kind": "all-reduce",
      "types": ("f32",),
      "bytes": 4 * (trained + 2),
      "times": 1,
      "looped": False,
    }
  ]
  held = made["bytes"]
  assert held["trainables"] == held["gradients"] == 4 * trained
  assert held["optimiser"] >= 2 * held["trainables"]
  assert made["fits"] and sum(held.values()) < made["total"]
  about = report.metadata(config, pod, "--config=configs/rte.py --rows=9")
  assert about["run"] == "vera-jax train --config=configs/rte.py"
  page = report.markdown({**about, "methods": {"vera": made}})
  assert f"| all-reduces per step | 1 × {4 * (trained + 2):,} B f32 |" in page


def test_what_xla_finds_no_room_for():
  def fail(*_, **__):
    raise jax.errors.JaxRuntimeError(message)

  step = SimpleNamespace(compile=fail)
  for text in (
    "Used 2.50G of 1.00G hbm.",
    "Ran out of memory on HBM, the total memory required for HLO temporaries"
    " (2.50G) exceeds available HBM (1.00G).",
  ):
    message = f"RESOURCE_EXHAUSTED: {text}"
    made = figures.compile_if_it_fits(step, 1, 8, effort=0.0)
    assert made == figures.TooLarge(int(2.5 * 2**30), 2**30)
  message = "INTERNAL: something else"
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    figures.compile_if_it_fits(step, 1, 8, effort=0.0)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_docs_tables_are_the_files(path):
  page = (ROOT / "docs/tpu_pod.md").read_text()
  assert report.markdown(json.loads(path.read_text())) in page


def test_runs_on_chips_of_their_own():
  """Compiled for v5e:2x4: one run's FLOPs and memory, and nothing is sent."""
  (path,) = (ROOT / "results/plans").glob("8-runs-*.json")
  result = json.loads(path.read_text())
  assert report.markdown(result) in (ROOT / "docs/meshes.md").read_text()
  one, eight = (
    result["methods"][f"vera, {name}"]
    for name in ("one run on one chip", "runs=8, data=1")
  )
  assert eight["flops"]["a_chip"] == pytest.approx(
    one["flops"]["a_chip"], rel=0.01
  )
  assert eight["total"] <= 1.01 * one["total"]
  assert eight["collectives"] == []


@pytest.mark.slow
def test_a_deep_stack_is_counted_from_shallow_ones():
  """Within 1 % of the same depth unrolled, and less for what is frozen."""
  config = meshes.config_of("vera")
  mesh = make_mesh(over=jax.devices()[:1])
  deep = {**meshes.FIELDS, "num_hidden_layers": 4}

  def compiled(config, fields, **options):
    step = abstract_step(config, fields, mesh, **options)
    return step.compile(rows=4, length=32)

  counted = depth.counts(config, deep, compiled)
  config.model.scan = False
  whole = compiled(config, deep).cost_analysis()
  assert counted["flops"] == pytest.approx(whole["flops"], rel=0.01)
  assert counted["moved"] == pytest.approx(whole["bytes accessed"], rel=0.01)
  config.method = "head"
  adapter = column_bias(), ("query", "value")
  bare = compiled(config, deep, adapter=adapter).cost_analysis()
  assert whole["flops"] > 1.01 * bare["flops"]
