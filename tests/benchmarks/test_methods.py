"""The table of methods says of each what the code does."""

import math

import pytest

from benchmarks import held_out, methods
from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.interface import Target
from vera_jax.adapters.methods import METHODS, adapter_named
from vera_jax.errors import UserError
from vera_jax.peft_io.forms import FORMS, HELD_BY


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].on_sites])
@pytest.mark.parametrize("i, o", [(40, 96), (96, 40)])
def test_a_formula_counts_what_the_code_does(method, i, o):
  defaults = {field.name: field.default for field in METHODS[method].fields}
  r, least = defaults.get("rank", 1), min(i, o)
  known = {"r": r, "i": i, "o": o, "min": least, "size": 4096}
  known["n"] = math.ceil(least / r)
  formula = METHODS[method].trained.split(",")[0]
  for written, meant in ((" (", " * ("), ("2 ", "2 * "), ("r o", "r * o")):
    formula = formula.replace(written, meant)
  found = adapter_size(adapter_named(method), {("layer",): Target(i, o)})
  assert found == eval(formula, {}, known)  # noqa: S307 - our own table


def test_every_method_is_in_the_table():
  assert HELD_BY.keys() <= METHODS.keys()
  assert {form for held in HELD_BY.values() for form in held} == FORMS.keys()
  table = methods.markdown().splitlines()[: 2 + len(METHODS)]
  refused = [line.split("`")[1] for line in table if "| refused |" in line]
  assert refused == ["randlora", "full"]


def test_rates_and_study_share_no_example(tmp_path, monkeypatch):
  monkeypatch.setattr(held_out, "DEV", 3)
  folder = tmp_path / "SST-2"
  folder.mkdir()
  rows = [f"text {i}\t{i % 2}\n" for i in range(20)]
  (folder / "train.tsv").write_text("".join(["sentence\tlabel\n", *rows]))
  (folder / "dev.tsv").write_text("sentence\tlabel\nown\t1\n")
  sizes = held_out.part(tmp_path, tmp_path / "out", "sst2", train_rows=5)
  assert list(sizes.values()) == [6, 4, 13, 2]
  read = [(tmp_path / "out" / p).read_text().splitlines()[1:] for p in sizes]
  assert sorted(sum(read[:3], [])) == sorted(row.strip() for row in rows)
  assert read[3] == ["own\t1"]
  with pytest.raises(UserError, match="too few"):
    held_out.part(
      tmp_path / "out/rates", tmp_path / "again", "sst2", train_rows=5
    )
  with pytest.raises(UserError, match="is missing"):
    held_out.part(tmp_path / "none", tmp_path / "again", "sst2", train_rows=5)
