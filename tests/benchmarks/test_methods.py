"""The table of methods says of each what the code does."""

import math

import pytest

from benchmarks import held_out, methods, rates
from vera_jax.adapters.apply import adapter_size
from vera_jax.adapters.interface import Target
from vera_jax.adapters.methods import METHODS, adapter_named
from vera_jax.errors import UserError
from vera_jax.peft_io.forms import FORMS, HELD_BY
from vera_jax.report.frame import load_sweep

RANKS = {"vera": 256, "dvora": 256, "pvera": 256, "randlora": 32, "unilora": 4}


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].on_sites])
@pytest.mark.parametrize("i, o", [(40, 96), (96, 40)])
def test_a_formula_counts_what_the_code_does(method, i, o):
  r, least = RANKS.get(method, 8), min(i, o)
  known = {"r": r, "i": i, "o": o, "min": least, "size": 4096}
  known["n"] = math.ceil(least / r)
  formula = methods.ROWS[method].formula.split(",")[0]
  for written, meant in ((" (", " * ("), ("2 ", "2 * "), ("r o", "r * o")):
    formula = formula.replace(written, meant)
  found = adapter_size(adapter_named(method), {("layer",): Target(i, o)})
  assert found == eval(formula, {}, known)  # noqa: S307 - our own table


def test_every_method_is_in_the_table():
  assert methods.ROWS.keys() == METHODS.keys()
  assert HELD_BY.keys() <= METHODS.keys()
  assert {form for held in HELD_BY.values() for form in held} == FORMS.keys()
  table = methods.markdown().splitlines()[: 2 + len(METHODS)]
  refused = [line.split("`")[1] for line in table if "| refused |" in line]
  assert refused == ["randlora", "full"]


def test_the_scores_beside_vera_and_lora():
  """On committed results of these two."""
  made = methods.markdown(methods.STUDY.parent / "glue").splitlines()
  assert made[2].endswith("| yes | yes | 81.0 |")
  rows = [line.split(" | ") for line in made[made.index("") + 3 :]]
  vera = next(row for row in rows if row[0] == "| sst2" and row[1] == "VeRA")
  lora = next(row for row in rows if row[0] == "| sst2" and row[1] == "LoRA")
  assert vera[3] == "7,680" and vera[7] == "" != vera[9]
  assert lora[9] == "" != lora[7]
  # the same pairs of seeds, seen from both sides
  assert float(vera[9].split()[0]) == -float(lora[7].split()[0])


@pytest.mark.parametrize(
  "means, best, missing",
  [
    ({1: 70.0, 2: 80.0, 4: 75.0}, 2, None),
    ({1: 70.0, 2: 80.0, 4: 85.0}, 4, 8),
    ({1: 90.0, 2: 80.0, 4: 85.0}, 1, 0.5),
    ({1: 70.0, 2: 80.0, 4: 80.0}, 2, None),
    ({1: 70.0}, 1, 2),
  ],
)
def test_a_rate_is_chosen_once_both_sides_fall(means, best, missing):
  choice = rates.choose("vera", means)
  assert (choice.best, choice.missing) == (best, missing)


def test_the_rates_of_a_sweep():
  """The committed one, whose grid holds both methods' best."""
  found = list(rates.choices(load_sweep(methods.STUDY.parent / "rates")))
  chosen = {choice.method.split(",")[0]: choice.best for choice in found}
  assert chosen == {"vera": 4e-2, "lora": 4e-3}
  assert all(choice.missing is None for choice in found)


def test_rates_and_study_share_no_example(tmp_path, monkeypatch):
  monkeypatch.setattr(held_out, "TRAIN", 5)
  monkeypatch.setattr(held_out, "DEV", 3)
  folder = tmp_path / "SST-2"
  folder.mkdir()
  rows = [f"text {i}\t{i % 2}\n" for i in range(20)]
  (folder / "train.tsv").write_text("".join(["sentence\tlabel\n", *rows]))
  (folder / "dev.tsv").write_text("sentence\tlabel\nown\t1\n")
  sizes = held_out.part(tmp_path, tmp_path / "out", "sst2")
  assert list(sizes.values()) == [6, 4, 13, 2]
  read = [(tmp_path / "out" / p).read_text().splitlines()[1:] for p in sizes]
  assert sorted(sum(read[:3], [])) == sorted(row.strip() for row in rows)
  assert read[3] == ["own\t1"]
  with pytest.raises(UserError, match="too few"):
    held_out.part(tmp_path / "out/rates", tmp_path / "again", "sst2")
  with pytest.raises(UserError, match="is missing"):
    held_out.part(tmp_path / "none", tmp_path / "again", "sst2")
