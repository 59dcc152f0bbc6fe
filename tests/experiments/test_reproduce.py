"""The page that says how the paper is reproduced is what its sources say."""

from pathlib import Path

import pytest

from configs import open_choices, paper
from experiments import reproduce
from vera_jax.report.published import cells

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # all runs of all sweeps are planned
@pytest.mark.skipif(
  not (ROOT / "docs/reproduce.md").exists(), reason="not in a checkout"
)
def test_the_page_is_what_the_command_prints():
  text = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
  assert text == reproduce.page()


@pytest.mark.skipif(
  not (ROOT / "docs/reproduce.md").exists(), reason="not in a checkout"
)
def test_the_page_has_every_number_command_and_choice():
  text = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
  for table, source in paper.SOURCES.items():
    assert f"**{table}**" in text
    assert " ".join(reproduce.report_command(table)) in text
    for name in source.sweeps:
      assert " ".join(reproduce.sweep_command(name)) in text
      assert paper.load(name).overrides
    for model in source.weights:
      assert f"`{model}`" in text
  for cell in cells():
    assert cell.printed in text and cell.row in text
  for choice in open_choices.CHOICES:
    assert choice.why in text
  assert reproduce.rehearsed() in text


def test_a_sweep_was_rehearsed_in_one_way():
  sweeps = {name for one in paper.SOURCES.values() for name in one.sweeps}
  names = [name for some in paper.REHEARSED.values() for name in some]
  assert len(names) == len({*names}) and {*names} <= sweeps


def test_the_weights_are_those_that_the_sweeps_load():
  for table, source in paper.SOURCES.items():
    planned = {one["model"]["name"] for one in paper.planned(table)}
    assert planned == {*source.weights}, table


@pytest.mark.parametrize(
  "choice", open_choices.CHOICES, ids=lambda choice: choice.key
)
def test_a_choice_is_what_the_configs_have(choice):
  """Of each setting some run of the tables has our value."""
  group, _, key = choice.key.partition(".")
  if " " in choice.key:
    return
  values = [
    one[group][key] if key else one[group]
    for table in paper.SOURCES
    for one in paper.planned(table)
    if not key or key in one.get(group, {})
  ]
  wanted = choice.value if isinstance(choice.value, tuple) else (choice.value,)
  assert {*wanted} <= {*values}
