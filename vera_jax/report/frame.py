"""A folder of results as a DataFrame, one row per run."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from flax.traverse_util import flatten_dict

from vera_jax import results
from vera_jax.adapters.methods import groups_of
from vera_jax.adapters.norms import SHORT, norms_beside
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.report.signatures import COLLAPSED, signatures

# The methods in the order of tables and figures, as figures write them.
METHODS = {
  "vera": "VeRA",
  "lora": "LoRA",
  "ia3": "IA3",
  "dora": "DoRA",
  "dvora": "DVoRA",
  "bitfit": "BitFit",
  "head": "head alone",
  "full": "full",
}
# Settings that make no condition: the first three have columns of their own,
# the others say where a run took place and what it logged.
ASIDE = (
  *("seed", "task", "method"),
  *("log", "predict_test", "mesh", "data.cache_dir", "data.source"),
)


def method_title(method: str) -> str:
  """A method's name, or a chain's, as tables and figures write it."""
  return " + ".join(METHODS.get(name, name) for name in method.split("+"))


class Sweep(NamedTuple):
  """A folder's results.

  Attributes:
    title: of its figures; the folder's name where no sweep.json says.
    paper: the model whose published numbers stand beside ours; "" for the
      trained one.
    runs: one row per run: task, method, condition, seed, score (best epoch, in
      percent), last, adapter, head, seconds, collapsed, signatures, folder,
      result.
    failed: what the failed.json files say, with each one's `run`.
  """

  title: str
  paper: str
  runs: pd.DataFrame
  failed: list[dict[str, Any]]


def load_sweep(*folders: str | Path) -> Sweep:
  """The results below some folders.

  Raises:
    UserError: there is none, or a file that can't be read.
  """
  places: list[Path] = []
  failed: list[dict[str, Any]] = []
  plan: dict[str, Any] = {}
  for folder in map(Path, folders):
    file = folder / "sweep.json"
    own_plan = read_json(file) if file.exists() else {}
    plan = plan or own_plan
    order = {name: i for i, name in enumerate(own_plan.get("runs", ()))}
    places += sorted(
      (path.parent for path in sorted(folder.rglob(results.FILE))),
      key=lambda place: order.get(place.name, len(order)),
    )
    failed += [
      {**read_json(path), "run": path.parent.name}
      for path in sorted(folder.rglob(results.FAILED))
    ]
  if not places:
    there = ", ".join(map(str, folders))
    more = f"; {len(failed)} runs failed" if failed else ""
    raise UserError(f"There is no result.json below {there}{more}.")
  found = [read_json(place / results.FILE) for place in places]
  for result, place in zip(found, places, strict=True):
    if "norms" not in result:  # older results; an adapter beside them has them
      result["norms"] = norms_beside(place)
  title = plan.get("title") or " and ".join(Path(f).name for f in folders)
  return Sweep(title, plan.get("paper", ""), frame(found, places), failed)


def frame(
  found: Sequence[Mapping[str, Any]], folders: Sequence[Path] | None = None
) -> pd.DataFrame:
  """One row per run, in order of task, method, condition and seed.

  Conditions come by rank where runs have one, else in the order of `found`.

  Args:
    found: the contents of result.json files.
    folders: where each was found.
  """
  rows = []
  places: Sequence[Path | None] = folders or [None] * len(found)
  for result, name, place in zip(found, _names(found), places, strict=True):
    config, flags = result["config"], signatures(result)
    groups = [config.get(g, {}) for g in groups_of(result["method"]).values()]
    rows.append(
      {
        "task": result["task"],
        "method": result["method"],
        "condition": name,
        "seed": result["seed"],
        "score": 100 * result["best"]["score"],
        "last": 100 * result["last"]["score"],
        "metric": result["score_name"],
        "adapter": result["parameters"]["adapter"],
        "head": result["parameters"]["head"],
        "rank": next((g["rank"] for g in groups if "rank" in g), None),
        "rate": result.get("learning_rates", {}).get("adapter_lr"),
        "epochs": config["optim"]["epochs"],
        "seconds": result["seconds"],
        "collapsed": COLLAPSED in flags,
        "signatures": flags,
        "folder": place,
        "result": result,
      }
    )
  table = pd.DataFrame(rows)
  by_rank = table.sort_values("rank", kind="stable", na_position="first")
  order = {
    "method": list(dict.fromkeys([*METHODS, *table["method"]])),
    "condition": list(by_rank["condition"].unique()),
  }
  return table.sort_values(
    ["task", "method", "condition", "seed"],
    key=lambda column: (
      column.map(order[column.name].index) if column.name in order else column
    ),
    ignore_index=True,
  )


def _names(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """What distinguishes a run's condition from others of its task and method.

  In words: "rank 64, d_init 0.1". A value that more than half of the conditions
  have is left out; a condition that has only such values is "default". "" where
  there is only one condition.
  """
  groups: dict[tuple[str, str], list[dict[str, str]]] = {}
  every = []
  for result in found:
    method = result["method"]
    # Another method's settings don't bear on the run.
    used = groups_of(method).values()
    aside = (*ASIDE, *(name for name in METHODS if name not in used))
    flat = flatten_dict(dict(result["config"]), sep=".")
    every.append(
      {
        key: _in_words(value)
        for key, value in flat.items()
        if not any(key == a or key.startswith(f"{a}.") for a in aside)
      }
    )
    group = groups.setdefault((result["task"], method), [])
    if every[-1] not in group:
      group.append(every[-1])
  names = []
  for result, own in zip(found, every, strict=True):
    group = groups[result["task"], result["method"]]
    words = []
    for key in dict.fromkeys(key for other in group for key in other):
      value = own.get(key, "None")
      same = Counter(other.get(key, "None") for other in group)[value]
      if same <= len(group) / 2:
        words.append(f"{key.rpartition('.')[-1]} {value}")
    names.append(", ".join(words) or ("default" if len(group) > 1 else ""))
  return names


def _in_words(value: Any) -> str:
  """A setting's value; target patterns as "query + value of layers 0, 1, 2"."""
  if isinstance(value, float):
    return f"{value:g}"
  if not isinstance(value, list | tuple):
    return str(value)
  # A pattern is the path in a block, perhaps after "layer_(0|1)/.*/".
  parts = [
    str(pattern).removeprefix(r"layer_\d+/").rpartition("/.*/")
    for pattern in value
  ]
  where = {layers for layers, _, _ in parts}
  if len(where) != 1:  # each pattern has layers of its own
    return " + ".join(map(str, value))
  kinds = []
  for _, _, path in parts:
    plain = path.replace("/", ".")
    kinds.append(
      SHORT.get(plain, plain.replace(".dense", "").replace(".", " "))
    )
  every_kind = set(kinds) == set(SHORT.values())
  name = "all linear layers" if every_kind else " + ".join(kinds)
  numbers = re.findall(r"\d+", where.pop())
  if not numbers:
    return name
  word = "layer" if len(numbers) == 1 else "layers"
  return f"{name} of {word} {', '.join(numbers)}"


def history(runs: pd.DataFrame) -> pd.DataFrame:
  """One row per epoch of each run: score in percent, training loss."""
  rows = [
    {
      **row[["task", "method", "condition", "seed"]].to_dict(),
      "epoch": epoch["epoch"],
      "step": epoch.get("step"),
      "score": 100 * epoch["score"],
      "loss": epoch.get("train_loss"),
    }
    for _, row in runs.iterrows()
    for epoch in row["result"]["history"]
  ]
  return pd.DataFrame(rows)


def norms(runs: pd.DataFrame) -> pd.DataFrame:
  """One row per trained leaf and run; empty where results have no norms."""
  rows = [
    {**row[["task", "method", "condition", "seed"]].to_dict(), **vector}
    for _, row in runs.iterrows()
    for vector in row["result"].get("norms") or []
  ]
  return pd.DataFrame(rows)
