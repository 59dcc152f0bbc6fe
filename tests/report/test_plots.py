"""Every figure draws, and no text lies on another."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from vera_jax.errors import UserError
from vera_jax.report import plots, style
from vera_jax.report.frame import Sweep, frame, method_title, norms
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
    {"vera__d_init": 1.0, "collapsed": True, "scores": (0.53, 0.79)},
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
  assert {path.suffix for path in tmp_path.iterdir()} == {
    *(".png", ".svg", ".pdf")
  }


def test_figures_for_a_paper(ablations, rank_sweep, methods):
  """In any width; a method has one colour and marker in all of them."""
  seen: dict[str, set] = {}
  for sweep in (ablations, rank_sweep, methods):
    for width in (style.COLUMN, style.TEXT):
      for figure in dict(
        plots.figures(sweep, summary(sweep), width=width)
      ).values():
        assert figure.get_figwidth() == width and not figure.get_suptitle()
        assert overlaps(figure) == ([], [])
        for ax in figure.axes:
          lines = [(bars.lines[0], bars.get_label()) for bars in ax.containers]
          lines += [(line, line.get_label()) for line in ax.lines]
          for line, name in lines:
            method = str(name).partition(",")[0]
            seen.setdefault(method, set()).add(line.get_marker())
  for method in ("vera", "dvora", "lora", "ia3"):
    assert seen[method_title(method)] == {style.look(method)[1]}


@pytest.mark.parametrize(
  "text, inches",
  [("column", 3.25), ("text", 6.75), ("8.5cm", 3.3465), ("240pt", 3.3209)],
)
def test_widths(text, inches):
  assert style.width_of(text) == pytest.approx(inches, abs=1e-4)
  for wrong in (f"{text}s", "-3in", "0.1in", "5"):
    with pytest.raises(UserError, match="no figure's width: column"):
      style.width_of(wrong)


def test_outliers_stand_at_the_edge_with_their_values(make_result):
  found = [
    make_result("vera", seed, (0.8 + seed / 100,), vera__rank=rank)
    for rank in (1, 4, 16)
    for seed in (0, 1)
  ]
  found += [
    make_result("lora", seed, (0.5 + seed / 1000,), collapsed=True)
    for seed in (0, 1)
  ]
  sweep = Sweep("Outliers", "", frame(found), [])
  table = summary(sweep).assign(paper=None)
  (ax,) = plots.score_figure(table, sweep.runs).axes
  assert ax.get_xlim()[0] > 79
  assert [text.get_text() for text in ax.texts] == ["50.0 to 50.1"]
  # where most are as low nothing is left out
  values = np.array([50.0, 51.0, 52.0, 80.0])
  assert style.inside(values, values) == (50.0, 52.0)
  assert style.inside(values, values[3:]) == (50.0, 52.0)
  values = np.array([50.0, 51.0, 80.0, 81.0])
  assert style.inside(values, values) == (50.0, 81.0)


def test_many_rows_are_in_panels_by_rank(make_result):
  inits = ("kaiming_uniform", "orthogonal", "rademacher", "sparse_root")
  found = [
    make_result("vera", 0, (0.8,), vera__rank=rank, vera__init=init)
    for rank in (1, 4, 16)
    for init in inits
  ]
  sweep = Sweep("Inits", "roberta-base", frame(found), [])
  figure = dict(plots.figures(sweep, summary(sweep)))["scores"]
  assert [ax.get_title() for ax in figure.axes if ax.get_visible()] == [
    *("RTE, rank 1", "RTE, rank 4", "RTE, rank 16")
  ]
  names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert "VeRA, sparse root" in names and len(names) == 4
  # the paper's numbers are another model's
  keys = [text.get_text() for text in figure.legends[0].get_texts()]
  assert "the paper's" not in keys


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
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == ["VeRA, r = 1, 16, 256", "LoRA, r = 1, 8"]
  assert ax.get_xscale() == "log"


def test_every_method_with_an_adapter_is_named(methods):
  (legend,) = plots.method_figure(summary(methods)).legends
  names = {text.get_text() for text in legend.get_texts()}
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
