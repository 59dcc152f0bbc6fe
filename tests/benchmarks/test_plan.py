"""A plan reads programs rightly, finds the largest batch, speaks clearly."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import meshes
from configs import instruct
from experiments.plans import chips, depth, figures, frozen, report
from experiments.plans.collectives import collectives
from experiments.plans.frozen import column_bias
from experiments.plans.hlo import product_flops
from experiments.plans.lowering import Rows, abstract_step, architecture
from experiments.plans.meshes import ROOM, candidates
from experiments.plans.search import largest
from experiments.plans.tasks import planned_task
from vera_jax.errors import UserError
from vera_jax.models import known_shapes
from vera_jax.pretrained.sharding import make_mesh
from vera_jax.train.flops import flops_of
from vera_jax.train.setup import build_blueprint

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "results/plans").glob("roberta*.json"))
SCALE = sorted((ROOT / "results/plans/scale").iterdir())
# What a TPU's program has and the CPU's does not.
TPU = """HloModule step

%body.1 (p: (f32[4])) -> (f32[4]) {
  %g = (bf16[2,8]{1,0:T(8,128)(2,1)}, bf16[2,64]{1,0}) all-gather-start(%x), channel_id=7, replica_groups=[2,8]<=[16], dimensions={1}
  %h = (bf16[2,8]{1,0}, bf16[2,64]{1,0}) all-gather-start(%x), channel_id=7, replica_groups=[2,8]<=[16], dimensions={1}
  %r = f32[4]{0:T(256)} reduce-scatter(%y), replica_groups={{0,1,2},{3,4,5}}, to_apply=%add
  ROOT %t = (f32[4]) tuple(%r)
}

%cond.1 (p: (f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(11)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.2 (p: (f32[4])) -> (s32[]) {
  %two = s32[]{:T(128)} constant(2)
  %j = s32[] get-tuple-element(%p), index=0
  %k = s32[] add(%j, %two)
  %q = f32[4]{0:T(256)} collective-permute(%y), channel_id=9
  ROOT %t = (s32[]) tuple(%k)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %v = (f32[4]) while(%i), condition=%cond.1, body=%body.2
  %w = (f32[4]) while(%i), condition=%cond.1, body=%body.1
  %s = (f32[4]{0}, pred[9]{0}) all-reduce(%a, %b), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  ROOT %o = f32[4] get-tuple-element(%w), index=0
}
"""  # noqa: E501


def test_collectives_in_a_tpus_program():
  by_two, gathered, scattered, reduced = collectives(TPU)
  assert by_two == ("collective-permute", ("f32",), 16, 6, True, 0)
  assert gathered == ("all-gather", ("bf16",), 2 * 64 * 2, 11, True, 8)
  assert scattered == ("reduce-scatter", ("f32",), 3 * 16, 11, True, 3)
  assert reduced == ("all-reduce", ("f32", "pred"), 16 + 9, 1, False, 4)
  assert gathered.wire == 11 * 256 * 7 / 8
  assert reduced.wire == 2 * 25 * 3 / 4


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
  pod = chips.Pod("cpu", jax.devices(), "cpu", 2**30, 1e12, 1e11, 1e10)
  made = figures.plan(config, pod, rows=9, search=False)
  assert (made["rows"], made["rows_a_chip"], made["compiles"]) == (16, 2, 1)
  trained = made["parameters"]["adapter"] + made["parameters"]["head"]
  assert made["collectives"] == [
    {
      "kind": "all-reduce",
      "types": ("f32",),
      "bytes": 4 * (trained + 2),
      "times": 1,
      "looped": False,
      "group": 8,
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
    made = figures.compile_if_it_fits(step, Rows(1, 8), effort=0.0)
    assert made == figures.TooLarge(int(2.5 * 2**30), 2**30)
  message = "INTERNAL: something else"
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    figures.compile_if_it_fits(step, Rows(1, 8), effort=0.0)


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


def test_products_in_a_loop_count_each_time():
  """As in the traced program, with a batched product and a gradient."""

  def body(x, w):
    return jnp.tanh(jnp.einsum("bij,bjk->bik", x, w)), None

  def loss(x, ws):
    return jax.lax.scan(body, x, ws)[0].sum()

  step = jax.jit(jax.grad(loss, argnums=(0, 1)))
  traced = step.trace(jnp.ones((3, 8, 8)), jnp.ones((5, 3, 8, 8)))
  counted = product_flops(traced.lower().compile().as_text())
  assert counted == flops_of(traced.jaxpr.jaxpr) == 3 * 5 * 2 * 3 * 8**3


@pytest.mark.smoke
def test_a_tpus_batched_product_is_no_wide_window():
  """TPUs have the batch as an axis along which a window meets one input."""
  text = """HloModule m

ENTRY %main (a: f32[4,8,32], b: f32[4,16,32]) -> f32[4,8,16] {
  %a = f32[4,8,32]{2,1,0} parameter(0)
  %b = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %c = f32[4,8,16]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
}
"""  # noqa: E501
  assert product_flops(text) == 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize(
  "model, billions",
  [("llama3_8b", 8.03), ("llama3_70b", 70.55), ("qwen3_32b", 32.76)],
)
def test_known_shapes_have_the_published_numbers(model, billions):
  config = instruct.get_config(model)
  made = build_blueprint(
    config, architecture(config), planned_task(config), scan=True
  )
  count = sum(leaf.size for leaf in made.shapes.values())
  assert round(count / 1e9, 2) == billions


def tiny_decoder(tmp_path):
  """(a config of a small decoder, four CPU devices as a pod)."""
  config = instruct.get_config("llama3_8b")
  fields = known_shapes.llama(32, 64, 2, 4, vocab_size=64)
  (tmp_path / "config.json").write_text(json.dumps(dict(fields)))
  config.model.name, config.model.quantise = str(tmp_path), "none"
  config.data.max_length, config.vera.rank = 16, 8
  pod = chips.Pod("cpu", jax.devices()[:4], "cpu", 2**20, 1e12, 1e11, 1e10)
  return config, pod


def test_meshes_that_a_run_would_refuse_are_refused(tmp_path):
  """The fastest of those that fit is first; one that can't be is last."""
  config, pod = tiny_decoder(tmp_path)
  pod = pod._replace(memory=2**30)
  made = build_blueprint(config, architecture(config), planned_task(config))

  def stored(model, mesh):
    return 2**31 / mesh.shape["fsdp"]  # on one part it does not fit

  tried = candidates(made, pod, Rows(8, 16), stored)
  fits = [one for one in tried if one.bytes <= ROOM * pod.memory]
  assert fits and {one.fsdp for one in fits} == {4}
  assert tried[: len(fits)] == fits
  seconds = [one.seconds for one in fits]
  assert seconds == sorted(seconds)
  made = made._replace(config=replace(made.config, num_key_value_heads=2))
  last = candidates(made, pod, Rows(8, 16), stored)[-1]
  assert (last.tensor, last.fsdp, last.bytes) == (4, 1, 0)
  json.dumps([one._asdict() for one in tried], allow_nan=False)
  assert "2 attention heads do not divide" in last.refused


@pytest.mark.slow
def test_a_decoder_is_planned_without_data_or_weights(tmp_path):
  """Its default mesh does not fit, so that one is searched; of the frozen
  network one sum of its own trained numbers is sent at the end."""
  config, pod = tiny_decoder(tmp_path)
  config.method = "head"
  network = frozen.frozen_network(config)
  made = figures.plan(config, pod, rows=4, search=False, **network)
  assert made["searched"] and made["mesh"]["fsdp"] > 1
  assert made["learned"] == made["length"] == 16
  trained = made["parameters"]["adapter"]
  ends = [x for x in made["collectives"] if not x["looped"]]
  assert 4 * (trained + 2) in [x["bytes"] for x in ends]
  assert made["bound"] == max(made["seconds"].values()) > 0


@pytest.mark.slow
def test_a_pod_that_is_not_there(tmp_path):
  """By the TPU's compiler: kernels are gathered in bfloat16, once for each
  layer and pass, and trained numbers are summed once, in float32."""
  pytest.importorskip("libtpu")
  chips.use_no_accelerator()
  config, _ = tiny_decoder(tmp_path)
  config.mesh.fsdp = 4
  pod = chips.describe_pod("v5e:2x2")
  made = figures.plan(config, pod, rows=4, search=False, effort=-1.0)
  looped = [x for x in made["collectives"] if x["looped"]]
  assert looped and all(x["times"] % 2 == 0 for x in looped)  # two layers
  wide = [x for x in looped if x["types"] == ("f32",)]
  assert not any(x["kind"] == "all-gather" for x in wide)
  trained = made["parameters"]["adapter"]
  (last,) = (x for x in made["collectives"] if x["kind"] == "all-reduce")
  assert (last["bytes"], last["times"]) == (4 * (trained + 2), 1)


@pytest.mark.parametrize("method", ["frozen", "vera"])
def test_what_70b_receives_is_what_a_hand_counts(method):
  """A step on 256 shards, as docs/scale.md counts it: A and B are sent by no
  chip to another."""
  path = ROOT / "results/plans/scale/pod/Llama-3.1-70B-v5e-16x16.json"
  made = json.loads(path.read_text())["methods"][method]
  fields = known_shapes.KNOWN["meta-llama/Llama-3.1-70B"]
  width, inner, layers = (
    fields[name]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
  )
  attention = 2 * width * (width + width // 8)  # q, o; k, v have fewer heads
  feed_forward = 3 * width * inner
  numbers = layers * (3 * attention + 2 * feed_forward)
  numbers += width * fields["vocab_size"]
  trained = 4 * made["parameters"]["adapter"]
  by_hand = 255 / 256 * (2 * numbers + 2 * trained)
  assert made["wire"] == pytest.approx(by_hand, rel=0.05)


@pytest.mark.parametrize("folder", SCALE, ids=lambda path: path.name)
def test_the_tables_of_large_models_are_the_files(folder):
  paths = sorted(folder.rglob("*.json"))
  made = report.at_scale(json.loads(path.read_text()) for path in paths)
  assert made in (ROOT / "docs/scale.md").read_text()


def test_what_vera_adds_to_a_large_model():
  """It computes at most 7 % more than the frozen network, and sums at the end
  what it trains, of which `tensor` may have parts."""
  for path in sorted((ROOT / "results/plans/scale/pod").glob("*.json")):
    result = json.loads(path.read_text())
    vera, bare = (result["methods"][name] for name in ("vera", "frozen"))
    assert vera["flops"]["a_chip"] < 1.07 * bare["flops"]["a_chip"]
    trained = vera["parameters"]["adapter"]
    *_, last = (x for x in vera["collectives"] if x["kind"] == "all-reduce")
    assert (last["types"], last["times"]) == (["f32"], 1)
    assert last["bytes"] <= 4 * (trained + 2)
    if vera["mesh"]["tensor"] == 1:
      assert last["bytes"] == 4 * (trained + 2)
