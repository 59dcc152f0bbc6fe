"""Every figure draws, and no text lies on another."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from vera_jax.report import plots
from vera_jax.report.frame import Sweep, frame, norms
from vera_jax.report.summary import summary


def overlaps(figure):
  """Pairs of texts whose boxes meet, and texts that leave the figure."""
  FigureCanvasAgg(figure).draw()
  hidden = set(hidden_ticks(figure))
  boxes = [
    (text.get_text(), text.get_window_extent())
    for text in figure.findobj(Text)
    if text.get_visible() and text.get_text().strip() and text not in hidden
  ]
  boxes = [(name, box) for name, box in boxes if box.width > 1]
  pairs = [
    (a, b)
    for (a, one), (b, two) in itertools.combinations(boxes, 2)
    if one.shrunk(0.9, 0.8).overlaps(two.shrunk(0.9, 0.8))
  ]
  outside = [
    name
    for name, box in boxes
    if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1
  ]
  return pairs, outside


def hidden_ticks(figure):
  """Labels that matplotlib keeps for ticks beyond the axes, and unused ones."""
  for ax in figure.axes:
    for axis, (low, high) in (
      (ax.xaxis, sorted(ax.get_xlim())),
      (ax.yaxis, sorted(ax.get_ylim())),
    ):
      for tick in (*axis.majorTicks, *axis.minorTicks):
        if not ax.get_visible() or not low <= tick.get_loc() <= high:
          yield from (tick.label1, tick.label2)


@pytest.fixture(scope="module")
def ablations(make_result) -> Sweep:
  """Long names, collapsed runs, the paper's numbers."""
  every = (r"layer_\d+/output/dense", "query", "key", "value", "attention/x")
  settings = [
    {},
    {"vera__d_init": 1e-7},
    {"vera__d_init": 1.0, "collapsed": True, "scores": (0.53, 0.53)},
    {"vera__init": "kaiming_normal"},
    {"vera__train": "d"},
    {"vera__targets": every},
  ]
  found = [
    make_result(seed=seed, **{"scores": (0.6 + seed / 50, 0.8), **one})
    for one in settings
    for seed in (0, 1)
  ]
  return Sweep("Ablations", "", frame(found), [])


@pytest.fixture(scope="module")
def methods(make_result) -> Sweep:
  """Five methods, two of them of one size and score, one without an adapter."""
  sizes = {"vera": 7680, "dvora": 12288, "lora": 49152, "ia3": 12288, "head": 0}
  found = [
    make_result(method, seed, (0.6, 0.7 + seed / 50), adapter=size)
    for method, size in sizes.items()
    for seed in (0, 1)
  ]
  return Sweep("Methods", "", frame(found), [])


@pytest.mark.parametrize(
  "name, more",
  [
    ("rank_sweep", {"ranks", "norms"}),
    ("ablations", set()),
    ("methods", {"methods"}),
  ],
)
def test_all_figures(name, more, request, tmp_path):
  sweep = request.getfixturevalue(name)
  made = dict(plots.figures(sweep, summary(sweep)))
  expected = {"scores", "curves"} | more
  assert made.keys() == expected
  for figure in made.values():
    assert overlaps(figure) == ([], [])
  for path in plots.save(made["scores"], tmp_path, "scores"):
    assert path.stat().st_size > 5000
  assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}


def test_collapsed_runs_are_hollow_and_the_papers_number_is_there(ablations):
  table = summary(ablations)
  figure = plots.score_figure(table, ablations.runs)
  names = [t.get_text() for t in figure.legends[0].get_texts()]
  assert names == ["a seed", "median", "collapsed", "the paper's"]
  faces = [
    tuple(points.get_facecolor()[0]) for points in figure.axes[0].collections
  ]
  assert faces.count((1.0, 1.0, 1.0, 1.0)) == 1


def test_every_rank_is_named(rank_sweep):
  figure = plots.rank_figure(summary(rank_sweep))
  (ax,) = figure.axes
  names = [text.get_text() for text in ax.get_legend().get_texts()]
  assert names == ["VeRA, r = 1, 16, 256", "LoRA, r = 1, 8"]
  assert ax.get_xscale() == "log"


def test_every_method_with_an_adapter_is_named(methods):
  (ax,) = plots.method_figure(summary(methods)).axes
  names = {text.get_text() for text in ax.get_legend().get_texts()}
  assert names == {"VeRA", "DVoRA", "LoRA", "IA3"}


def test_scores_against_images_per_class(make_result):
  found = []
  for method, gain in {"vera": 0.05, "lora": 0.1, "head": 0.02}.items():
    for shots, seed in itertools.product((1, 10, 100), (0, 1)):
      result = make_result(method, seed, (0.3 + gain * np.log10(shots),))
      result["config"]["data"]["shots"] = shots
      found.append(result)
  sweep = Sweep("Shots", "", frame(found), [])
  made = dict(plots.figures(sweep, summary(sweep)))
  assert made.keys() == {"scores", "shots"}
  assert overlaps(made["shots"]) == ([], [])
  (ax,) = made["shots"].axes
  assert [text.get_text() for text in ax.get_xticklabels()] == [
    *("1", "10", "100")
  ]
  lines = {bars.get_label(): bars.lines[0] for bars in ax.containers}
  assert lines.keys() == {"VeRA", "LoRA", "head alone"}
  np.testing.assert_allclose(lines["LoRA"].get_ydata(), (30, 40, 50))


def test_probabilities_of_tokens_are_drawn_as_losses(make_result):
  """A method with one rate has no line, a diverged run is above the panel."""
  found = []
  rates = [("vera", 4e-3), ("vera", 1e-3), ("lora", 1e-3), ("lora", 9.0)]
  for method, rate in [*rates, ("bitfit", 2e-3)]:
    result = make_result(method, 0, (np.exp(-1 - rate),))
    result["score_name"] = "token_probability"
    result["learning_rates"] = {"adapter_lr": rate}
    result["config"]["optim"]["adapter_lr"] = rate
    found.append(result)
  table = summary(Sweep("Rates", "", frame(found), []))
  figure = plots.setting_figure(table, plots.SETTINGS["rates"])
  (ax,) = figure.axes
  lines = {bars.get_label(): bars.lines[0] for bars in ax.containers}
  assert lines.keys() == {"VeRA", "LoRA"}
  np.testing.assert_allclose(lines["VeRA"].get_ydata(), (1.001, 1.004))
  assert ax.get_ylabel().startswith("loss (nats per token)")
  assert 0.9 < ax.get_ylim()[0] < 1.001 < ax.get_ylim()[1] < 1.1


def test_norms_are_one_line_per_kind(rank_sweep):
  figure = plots.norm_figure(norms(rank_sweep.runs))
  assert len(figure.axes) == 6
  for ax in figure.axes:
    assert len(ax.lines) == 2
    assert list(ax.lines[0].get_ydata()) == [1, 2, 3]
