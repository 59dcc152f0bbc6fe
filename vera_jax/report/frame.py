"""A folder of results as a DataFrame, a row a run."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from flax.traverse_util import flatten_dict

from vera_jax import results
from vera_jax.adapters.norms import SHORT, norms_beside
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.report.signatures import signatures

METHODS = ("vera", "lora", "bitfit", "head", "full")
# Settings that tell no condition from another: the first are a run's own,
# the others where it was run.
ASIDE = ("seed", "task", "method")
PLACES = ("log", "predict_test", "mesh", "data.cache_dir", "data.source")


class Sweep(NamedTuple):
  """A folder's results.

  Attributes:
    title: of its figures; the folder's name where no sweep.json says.
    paper: the model whose published numbers stand beside ours; "" for the
      trained one.
    runs: a row a run: task, method, condition, seed, score (best epoch, in
      percent), last, adapter, head, seconds, collapsed, signatures, folder,
      result.
    failed: what the failed.json files say.
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
  about: dict[str, Any] = {}
  for folder in map(Path, folders):
    plan = folder / "sweep.json"
    sweep = read_json(plan) if plan.exists() else {}
    about = about or sweep
    order = {name: place for place, name in enumerate(sweep.get("runs", ()))}
    places += sorted(
      results.finished(folder),
      key=lambda place: order.get(place.name, len(order)),
    )
    failed += results.read_failures(folder)
  if not places:
    there = ", ".join(map(str, folders))
    more = f"; {len(failed)} runs failed" if failed else ""
    raise UserError(f"There is no result.json below {there}{more}.")
  title = about.get("title") or " and ".join(Path(f).name for f in folders)
  runs = frame([_with_norms(place) for place in places], places)
  return Sweep(title, about.get("paper", ""), runs, failed)


def _with_norms(folder: Path) -> dict[str, Any]:
  """A result; older ones have no norms, but an adapter beside them has."""
  result = results.read(folder)
  assert result is not None  # its file was found
  if "norms" not in result:
    result["norms"] = norms_beside(folder)
  return result


def frame(
  found: Sequence[Mapping[str, Any]], folders: Sequence[Path] | None = None
) -> pd.DataFrame:
  """A row a run, in order of task, method, condition and seed."""
  places: Sequence[Path | None]
  places = [None] * len(found) if folders is None else folders
  keys = [_condition(result) for result in found]
  names = _names(found, keys)
  rows = [
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
      "rank": _rank(result),
      "rate": result.get("learning_rates", {}).get("adapter_lr"),
      "epochs": result["config"]["optim"]["epochs"],
      "seconds": result["seconds"],
      "collapsed": "collapsed" in (flags := signatures(result)),
      "signatures": flags,
      "folder": folder,
      "result": result,
    }
    for result, name, folder in zip(found, names, places, strict=True)
  ]
  table = pd.DataFrame(rows)
  order = table["method"].map(METHODS.index)
  conditions = list(dict.fromkeys(_sorted_names(found, names)))
  table = table.assign(
    _method=order, _place=table["condition"].map(conditions.index)
  )
  by = ["task", "_method", "_place", "seed"]
  table = table.sort_values(by, kind="stable").drop(columns=by[1:3])
  return table.reset_index(drop=True)


def _rank(result: Mapping[str, Any]) -> int | None:
  return result["config"].get(result["method"], {}).get("rank")


def _condition(result: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that bear on a run, without those that are its own."""
  flat = flatten_dict(dict(result["config"]), sep=".")
  others = tuple(f"{m}." for m in METHODS if m != result["method"])
  return {
    key: tuple(x) if isinstance(x, list) else x
    for key, x in flat.items()
    if not key.startswith(others)
    and key not in ASIDE
    and not any(key == p or key.startswith(f"{p}.") for p in PLACES)
  }


def _names(
  found: Sequence[Mapping[str, Any]], keys: Sequence[dict[str, Any]]
) -> list[str]:
  """What tells a run's condition from the others of its task and method.

  In words: "rank 64, d_init 0.1". A value that more than half of the conditions
  have goes without saying; one that has only such values is "default". "" where
  there is one condition only.
  """
  alike: dict[tuple, dict[str, dict[str, Any]]] = {}
  for result, key in zip(found, keys, strict=True):
    group = alike.setdefault((result["task"], result["method"]), {})
    group[repr(key)] = key
  return [
    _name(key, list(alike[result["task"], result["method"]].values()))
    for result, key in zip(found, keys, strict=True)
  ]


def _name(key: dict[str, Any], group: Sequence[dict[str, Any]]) -> str:
  if len(group) == 1:
    return ""
  words = []
  for name in _union(group):
    values = Counter(repr(other.get(name)) for other in group)
    own = values[repr(key.get(name))]
    if own < len(group) and own <= len(group) / 2:
      words.append(f"{name.rpartition('.')[-1]} {_word(key.get(name))}")
  return ", ".join(words) or "default"


def _union(group: Iterable[dict[str, Any]]) -> list[str]:
  return list(dict.fromkeys(key for one in group for key in one))


def _word(value: Any) -> str:
  if isinstance(value, tuple):
    return _targets([str(pattern) for pattern in value])
  return f"{value:g}" if isinstance(value, float) else str(value)


def _targets(patterns: Sequence[str]) -> str:
  """Target patterns for a person: "query + value of layers 0, 1, 2"."""
  parts = [
    pattern.replace(r"layer_\d+/", "").rpartition("/.*/")
    for pattern in patterns
  ]
  names = [_kind(name) for _, _, name in parts]
  layers = {layers for layers, _, _ in parts}
  if len(layers) > 1:  # of each its own
    return " + ".join(patterns)
  if set(names) == set(SHORT.values()):
    return "all linear layers"
  numbers = re.findall(r"\d+", layers.pop())
  where = f" of layers {', '.join(numbers)}" if len(numbers) > 1 else ""
  where = f" of layer {numbers[0]}" if len(numbers) == 1 else where
  return " + ".join(names) + where


def _kind(name: str) -> str:
  """attention/output/dense -> attention output."""
  plain = name.replace("/", ".")
  return SHORT.get(plain, plain.replace(".dense", "").replace(".", " "))


def _sorted_names(
  found: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
  """By rank where runs have one, else in the order in which they come."""
  order = range(len(names))
  ranks = [_rank(result) or 0 for result in found]
  return [names[i] for i in sorted(order, key=lambda i: (ranks[i], i))]


def history(runs: pd.DataFrame) -> pd.DataFrame:
  """A row an epoch of each run: score in percent, training loss."""
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
  """A row a trained leaf of each run; empty where results have no norms."""
  rows = [
    {**row[["task", "method", "condition", "seed"]].to_dict(), **vector}
    for _, row in runs.iterrows()
    for vector in row["result"].get("norms") or []
  ]
  return pd.DataFrame(rows)
