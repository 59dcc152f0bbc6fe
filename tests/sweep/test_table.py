"""What a person sees of a sweep, and how long it will take."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from rich.console import Console

from vera_jax import results
from vera_jax.locks import locked
from vera_jax.sweep import estimate
from vera_jax.sweep import table as table_file
from vera_jax.sweep.plan import make_units
from vera_jax.sweep.table import (
  LiveTable,
  counts,
  plan_table,
  states,
)

STUDIES = Path(__file__).resolve().parents[2] / "results/sweeps"


def finish(run, *, seconds=12.0, members=1, collapsed=False):
  run.folder.mkdir(parents=True)
  best = {"epoch": 1, "score": 0.625, "collapsed": collapsed}
  results.write(
    run.folder,
    {
      "best": best,
      "score_name": "accuracy",
      "seconds": seconds,
      "members": members,
      "config": run.config.to_dict(),
    },
  )


def drawn(renderable, height=50):
  console = Console(width=120, height=height, force_terminal=False)
  with console.capture() as capture:
    console.print(renderable)
  return capture.get()


@pytest.fixture
def half_done(tiny_sweep):
  plan = tiny_sweep(optim__epochs=4)
  finish(plan.runs[0])
  finish(plan.runs[1], collapsed=True)
  for run in plan.runs[2:4]:
    run.folder.mkdir(parents=True)
  results.write(plan.runs[2].folder, {"failed": "loss is nan"}, results.FAILED)
  lines = [
    {"step": 310, "loss": 0.5},
    {"step": 620, "epoch": 1, "accuracy": 0.75},
    {"step": 930, "loss": 0.25},
  ]
  text = "\n".join(map(json.dumps, lines)) + '\n{"step": 94'
  (plan.runs[3].folder / "metrics.jsonl").write_text(text)
  return plan


def test_the_plan_counts_and_estimates(half_done):
  parts = make_units(half_done.runs, most=8)
  text = drawn(plan_table(half_done, parts, estimate.rate([])))
  assert counts(states(half_done.runs)) == "2 done, 1 failed, 3 new"
  assert "2 done" in text and "1 failed, 1 new" in text and "~" in text
  assert text.count("seed0") == 3


def test_the_live_table_shows_every_state(half_done):
  parts = make_units(half_done.runs, most=8)
  table = LiveTable(half_done, parts)
  with locked([half_done.runs[3].lock]):
    text = drawn(table._draw())
  lines = {
    line.split()[1]: line for line in text.splitlines() if "-seed" in line
  }
  name = [run.name for run in half_done.runs]
  assert "done" in lines[name[0]] and "0.6250" in lines[name[0]]
  assert "collapsed" in lines[name[1]]
  assert "failed" in lines[name[2]]
  running = lines[name[3]]
  # rte has 2,490 examples, 623 steps of 4: the plan doesn't read the data
  assert "running" in running and "1.5 of 4" in running
  assert "0.2500" in running and "0.7500" in running and "~" in running
  assert "2 done, 1 failed, 1 running, 2 new" in text and "left here" in text


def test_a_redraw_reads_no_data(half_done, monkeypatch):
  monkeypatch.setattr(table_file.time, "monotonic", lambda: 100.0)
  table = LiveTable(half_done, make_units(half_done.runs, most=8))
  first = drawn(table._draw())
  monkeypatch.setattr(estimate, "task_for", None)
  assert drawn(table._draw()) == first


def test_finished_runs_say_how_fast_the_machine_is(tiny_sweep):
  plan = tiny_sweep()
  run = plan.runs[0]
  finish(run, seconds=60.0, members=3)  # three shared these seconds
  rate = estimate.rate([results.read(run.folder)])
  assert rate.seconds([run.config]) == pytest.approx(estimate.START + 20)
  assert rate.seconds([]) == 0 and "1 finished" in rate.source
  given = estimate.rate([results.read(run.folder)], tflops=2.0)
  assert given.flops == 2e12


def test_more_is_dearer(tiny_config):
  small = estimate.flops(tiny_config())
  for changes in (
    {"optim__epochs": 6},
    {"vera__rank": 64},
    {"method": "full"},
    {"method": "lora+dvora"},
    {"data__max_train_examples": 99999, "task": "sst2"},
  ):
    assert estimate.flops(tiny_config(**changes)) > small
  for method in ("head", "ia3"):
    assert estimate.flops(tiny_config(method=method)) < small
  once = tiny_config()
  with once.unlocked():
    once.eval_epochs = once.optim.epochs
  assert estimate.flops(once) < small  # one evaluation, not one per epoch


@pytest.mark.skipif(not STUDIES.exists(), reason="not in a checkout")
@pytest.mark.parametrize("study", ["rates", "rank", "ablations", "glue"])
def test_an_estimate_is_near_what_a_study_took(study, minilm_folder):
  """Before any run, and by whichever run has finished first, within 1.5.

  Of later studies the pages say that other work shared the cores.
  """
  del minilm_folder  # the base, of which the estimate reads the shape
  files = STUDIES.glob(f"{study}/runs/*/result.json")
  runs = [json.loads(file.read_text("utf-8")) for file in files]
  total = sum(estimate.flops(ConfigDict(run["config"])) for run in runs)
  took = sum(run["seconds"] / run["members"] for run in runs)
  for finished in ([], *([run] for run in runs)):
    rate = estimate.rate(finished)
    assert 1 / 1.5 < total / rate.flops / took < 1.5, rate.source
