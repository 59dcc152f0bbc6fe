"""A folder of results as a DataFrame, one row per run."""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from flax.traverse_util import flatten_dict

from vera_jax import results
from vera_jax.adapters.methods import METHODS, groups_of
from vera_jax.adapters.vector_norms import SHORT
from vera_jax.data.written import FILES as WRITTEN
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.places import local_copy, place
from vera_jax.report.signatures import COLLAPSED, signatures

log = logging.getLogger(__name__)

SWEEP = "sweep.json"
UNTUNED = "untuned"  # in a method's place where a run trained nothing
BASELINE = "lora"  # the method that others are compared with
FORGETTING = "forgetting"  # a metric of which less is better
# The methods in the order of tables and figures, as figures write them.
TITLES = {
  UNTUNED: "untuned",
  **{name: line.title for name, line in METHODS.items()},
  "ridge": "ridge on features",
}
RUN = ["task", "metric", "method", "condition", "seed"]
PARTS = ("adapter", "head")  # that are trained, each at a rate of its own
# Settings that make no condition: the first three have columns of their own,
# the next one is a seed too, the others say where a run took place and what it
# logged.
ASIDE = (
  *("seed", "task", "method"),
  "data.subset_seed",
  *("log", "predict_test", "mesh", "data.cache_dir", "data.source"),
  "model.scan",  # changes rounding alone
)

NUMBER = (int, float)
# What tables read of a result, and its types in JSON.
READ: Mapping[str, Any] = {
  **dict.fromkeys(("task", "method", "score_name"), str),
  **dict.fromkeys(("seed", "seconds"), NUMBER),
  **dict.fromkeys(("best", "last"), {"score": NUMBER}),
  "parameters": {"adapter": int, "head": int},
  "config": {
    **{"task": str, "method": str, "model": {"name": str}},
    "optim": {"epochs": NUMBER},
  },
}
TEST = {"inputs": int, "missing": str}


def method_title(method: str) -> str:
  """A method's name, or a chain's, as tables and figures write it."""
  return " + ".join(TITLES.get(name, name) for name in method.split("+"))


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
    remarks: sentences on what was left out, and why.
  """

  title: str
  paper: str
  runs: pd.DataFrame
  failed: list[dict[str, Any]]
  remarks: tuple[str, ...] = ()


def load_sweep(*folders: str | Path) -> Sweep:
  """The results below some folders, each run once.

  A run that several files hold, by its settings, data and seed, is counted
  where it is found first. Files that can't be read are left out. The sweep's
  remarks name both.

  Raises:
    UserError: there is no result that can be read.
  """
  folders_of_runs: dict[Path, Path] = {}  # by the path behind all links
  failures: dict[Path, Path] = {}
  remarks: list[str] = []
  sweep: dict[str, Any] = {}

  def read(file: Path) -> dict[str, Any] | None:
    try:
      return read_json(file)
    except UserError as error:
      remarks.append(f"Left out: {error}")
      return None

  # of runs in a store, what reports read
  wanted = (SWEEP, results.FILE, results.FAILED, *WRITTEN)
  for top in [local_copy(folder, names=wanted) for folder in folders]:
    file = top / SWEEP
    about = (read(file) if file.exists() else None) or {}
    if not isinstance(about.get("runs", {}), dict):
      remarks.append(f"Left out: {file} has no runs by their names.")
      about = {}
    sweep = sweep or about
    order = {name: i for i, name in enumerate(about.get("runs", ()))}
    for folder in sorted(
      (path.parent for path in sorted(top.rglob(results.FILE))),
      key=lambda folder: order.get(folder.name, len(order)),
    ):
      folders_of_runs.setdefault(folder.resolve(), folder)
    for path in sorted(top.rglob(results.FAILED)):
      failures.setdefault(path.resolve(), path)
  counted: dict[str, tuple[dict[str, Any], Path]] = {}
  repeats, unequal = 0, []
  for folder in folders_of_runs.values():
    if (result := read(folder / results.FILE)) is None:
      continue
    try:
      _check(result, READ, "it")
      for group in groups_of(result["method"]).values():
        _check(result["config"].get(group, {}).get("rank", 0), NUMBER, "rank")
      if "test" in result:
        _check(result["test"], TEST, "test")
        _check_numbers(result["test"]["scores"], "test.scores")
      if "general" in result:
        _check(result["general"], {}, "general")
        _check(result["general"].get(FORGETTING, 0), NUMBER, FORGETTING)
      _check_numbers(result.get("learning_rates", {}), "learning_rates")
      names = ("task", "method", "seed", "data")
      same = [settings_of(result), *(result.get(name) for name in names)]
      key = json.dumps(same, sort_keys=True)
      history(frame([result]))
    except Exception as error:  # whatever is wrong with it, others are not
      remarks.append(
        f"Left out: {folder / results.FILE} is no run's result"
        f" ({type(error).__name__}: {error})."
      )
      continue
    first, _ = counted.setdefault(key, (result, folder))
    if first is not result:
      repeats += 1
      if first["best"] != result["best"]:
        unequal.append(str(folder))
  failed = [
    {**failure, "run": path.parent.name}
    for path in failures.values()
    if (failure := read(path)) is not None
  ]
  if repeats:
    other = f" Other scores than there have: {', '.join(unequal)}."
    remarks.append(
      f"Not counted again: {repeats} results of runs that are in the table,"
      f" with the same settings, data and seed.{other if unequal else ''}"
    )
  if not counted:
    missing = [str(folder) for folder in folders if not place(folder).exists()]
    why = f"There is no folder {', '.join(missing)}."
    if not missing:
      ended = f"{len(failed)} runs failed" if failed else "no run has ended"
      below = ", ".join(map(str, folders))
      why = f"There is no result.json below {below}: {ended}."
    raise UserError("\n".join([why, *remarks]))
  title = sweep.get("title") or " and ".join(Path(f).name for f in folders)
  runs = frame(*zip(*counted.values(), strict=True))
  return Sweep(title, sweep.get("paper", ""), runs, failed, tuple(remarks))


def _check(value: Any, kind: Any, name: str) -> None:
  """Raises a TypeError where a part of a result has another type.

  Args:
    value: the part.
    kind: its types; by name, those of what it holds.
    name: the part's name.
  """
  if isinstance(kind, Mapping) and isinstance(value, Mapping):
    for key, inner in kind.items():
      _check(value.get(key), inner, key)
  elif isinstance(kind, Mapping) or not isinstance(value, kind):
    raise TypeError(f"{name} is {value!r}"[:100])


def _check_numbers(value: Any, name: str) -> None:
  """The same of an object of numbers."""
  _check(value, dict.fromkeys(value, NUMBER), name)


def frame(
  runs: Sequence[Mapping[str, Any]], folders: Sequence[Path] | None = None
) -> pd.DataFrame:
  """One row per run, in order of task, method, condition and seed.

  Conditions come by rank where runs have one, else in the order of `runs`.

  Args:
    runs: the contents of result.json files.
    folders: those that they lie in.
  """
  rows = []
  lie_in: Sequence[Path | None] = folders or [None] * len(runs)
  for result, name, folder in zip(runs, _names(runs), lie_in, strict=True):
    config, flags = result["config"], signatures(result)
    method, sizes = _method_of(result), result["parameters"]
    untuned = method == UNTUNED
    used = () if untuned else groups_of(method).values()
    groups = [config.get(group, {}) for group in used]
    rows.append(
      {
        "task": result["task"],
        "method": method,
        "condition": name,
        "seed": result["seed"],
        "score": 100 * result["best"]["score"],
        "last": 100 * result["last"]["score"],
        "metric": result["score_name"],
        "adapter": 0 if untuned else sizes["adapter"],
        "head": 0 if untuned else sizes["head"],
        "rank": next((g["rank"] for g in groups if "rank" in g), None),
        "rate": result.get("learning_rates", {}).get(
          "adapter_lr" if sizes["adapter"] else "head_lr"
        ),
        "shots": config.get("data", {}).get("shots"),
        "data": _data_of(config),
        "epochs": config["optim"]["epochs"],
        "seconds": result["seconds"],
        "collapsed": COLLAPSED in flags,
        "signatures": flags,
        "folder": folder,
        "result": result,
      }
    )
  table = pd.DataFrame(rows)
  by_rank = table.sort_values("rank", kind="stable", na_position="first")
  order = {
    "method": list(dict.fromkeys([*TITLES, *table["method"]])),
    "condition": list(by_rank["condition"].unique()),
  }
  return table.sort_values(
    ["task", "method", "condition", "seed"],
    key=lambda column: (
      column.map(order[column.name].index) if column.name in order else column
    ),
    ignore_index=True,
  )


def _method_of(result: Mapping[str, Any]) -> str:
  """The method; `UNTUNED` where all that it would train has a rate of 0."""
  sizes, rates = result["parameters"], result.get("learning_rates", {})
  trained = [sizes[part] and rates.get(f"{part}_lr") != 0 for part in PARTS]
  return result["method"] if any(trained) else UNTUNED


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that make a run's condition, by flat key."""
  # Another method's settings don't bear on the run.
  used = groups_of(result["method"]).values()
  aside = (*ASIDE, *(name for name in METHODS if name not in used))
  flat = flatten_dict(dict(result["config"]), sep=".")
  return {
    key: value
    for key, value in flat.items()
    if not any(key == a or key.startswith(f"{a}.") for a in aside)
  }


def _data_of(config: Mapping[str, Any]) -> str:
  """The base and the data that a run is on, but for where these were."""
  unset = {"source": None, "cache_dir": None}
  data = {"general": None, **config.get("data", {}), **unset}
  return json.dumps([config["model"]["name"], data], sort_keys=True)


def _names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
  """What distinguishes a run's condition from others of its task and method.

  In words: "rank 64, d_init 0.1". A value that more than half of the conditions
  have is left out; a condition that has only such values is "default". "" where
  there is only one condition.
  """
  groups: dict[tuple[str, str], list[dict[str, str]]] = {}
  every = []
  for result in runs:
    settings = {k: _in_words(value) for k, value in settings_of(result).items()}
    group = groups.setdefault((result["task"], _method_of(result)), [])
    if settings not in group:
      group.append(settings)
    every.append((settings, group))
  names = []
  for settings, group in every:
    words = []
    for key in dict.fromkeys(key for other in group for key in other):
      value = settings.get(key, "None")
      counts = Counter(other.get(key, "None") for other in group)
      if counts[value] <= len(group) / 2:
        firsts = [_first_line(other) for other in counts]
        # all lines where the first one leaves values alike
        alone = firsts.count(_first_line(value)) == 1
        text = _first_line(value) if alone else " ".join(value.split())
        words.append(f"{key.rpartition('.')[-1]} {text}")
    names.append(", ".join(words) or ("default" if len(group) > 1 else ""))
  return names


def _first_line(value: str) -> str:
  """Of a text of several lines, such as a prompt, the first one."""
  first, _, rest = value.partition("\n")
  return f"{first} …" if rest else first


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
      **row[RUN].to_dict(),
      "epoch": epoch["epoch"],
      "step": epoch.get("step"),
      "score": 100 * epoch["score"],
      "loss": epoch.get("train_loss"),
    }
    for _, row in runs.iterrows()
    for epoch in row["result"]["history"]
  ]
  return pd.DataFrame(rows)


def steps(runs: pd.DataFrame) -> pd.DataFrame:
  """One row per logged step: the training loss of its batch.

  Empty where no run has its metrics.jsonl beside its result.
  """
  rows = []
  for _, row in runs.iterrows():
    folder = row["folder"]
    for _, line in results.metric_lines(folder) if folder else ():
      if line.error:
        file = folder / results.METRICS
        log.warning("%s:%d is left out: %s.", file, line.number, line.error)
      elif "epoch" not in line.values:  # an epoch's line has the loss on dev
        rows.append({**row[RUN].to_dict(), **line.values})
  return pd.DataFrame(rows)


def norms(runs: pd.DataFrame) -> pd.DataFrame:
  """One row per trained leaf and run; empty where results have no norms."""
  rows = [
    {**row[RUN].to_dict(), **vector}
    for _, row in runs[runs["method"] != UNTUNED].iterrows()
    for vector in row["result"].get("norms") or []
  ]
  return pd.DataFrame(rows)
