"""A plan's file, its table, and the docs made from it."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from benchmarks.plans.chips import Pod
from vera_jax.files import read_json, write_json
from vera_jax.results import provenance

KINDS = {
  "base": "base",
  "projections": "A, B",
  "trainables": "trainables",
  "optimiser": "optimiser",
  "gradients": "gradients between passes",
}


def about(config: ConfigDict, pod: Pod, words: str) -> dict[str, Any]:
  """What was planned, on what, and by which command."""
  return {
    "model": config.model.name,
    "task": config.task,
    "topology": pod.name,
    "chip": pod.kind,
    "devices": len(pod.devices),
    "command": f"python -m experiments.plan {words}",
    "run": run_command(words),
    "versions": provenance()["versions"],
  }


def run_command(words: str) -> str:
  """The training command of the same settings, the same on every host."""
  own = [w for w in shlex.split(words) if w.lstrip("-").startswith("config")]
  return shlex.join(["python", "-m", "experiments.glue", *own])


def write(result: Mapping[str, Any], *, folder: str) -> Path:
  name = Path(str(result["model"])).name
  pod = str(result["topology"]).replace(":", "-")
  return save(result, f"{name}-{pod}", folder=folder)


def save(result: Mapping[str, Any], name: str, *, folder: str) -> Path:
  """NAME.json in the folder, which is made when missing."""
  path = Path(folder) / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, dict(result))
  return path


def read(path: Path) -> dict[str, Any]:
  return read_json(path)


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
  """(name, a text for each method) of all that is told."""
  made = list(result["methods"].values())

  def line(name: str, text: Any) -> tuple[str, list[str]]:
    return name, [text(one) for one in made]

  yield line(
    "rows of a batch (a chip)", lambda m: f"{m['rows']} ({m['rows_a_chip']})"
  )
  for kind, name in KINDS.items():
    yield line(f"MB {name}", lambda m, kind=kind: _mb(m["bytes"][kind]))
  yield line("MB temporaries", lambda m: _mb(m.get("temporaries")))
  yield line("MB in all, as laid out", lambda m: _mb(m["total"]))
  yield line("fits", lambda m: "yes" if m["fits"] else "NO")
  yield line("TFLOP a step and chip", lambda m: _tera(m, 1))
  yield line("TFLOP a step, all chips", lambda m: _tera(m, result["devices"]))
  yield line("all-reduces a step", lambda m: _sent(m, "all-reduce"))
  yield line("other collectives", _others)
  yield line("largest batch, rows (a chip)", _largest)
  yield line(
    "programs compiled (XLA's effort)",
    lambda m: f"{m['compiles']} ({m['effort']:+.0f})",
  )


def _mb(size: int | None) -> str:
  if size is None:
    return "-"
  return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.3f}"


def _tera(made: Mapping[str, Any], chips: int) -> str:
  if "flops" not in made:
    return "-"
  return f"{made['flops']['a_chip'] * chips / 1e12:.3f}"


def _sent(made: Mapping[str, Any], kind: str) -> str:
  """Each as times x bytes and type; what is in a loop is marked."""
  told = [
    f"{one['times']} x {one['bytes']:,} B {'/'.join(one['types'])}"
    + (" in a loop" if one["looped"] else "")
    for one in made.get("collectives", [])
    if one["kind"] == kind
  ]
  return ", ".join(told) or "none"


def _others(made: Mapping[str, Any]) -> str:
  told = [
    one for one in made.get("collectives", []) if one["kind"] != "all-reduce"
  ]
  if not told:
    return "none"
  runs = sum(one["times"] for one in told)
  size = sum(one["times"] * one["bytes"] for one in told)
  return f"{runs} of {size / 1e6:,.1f} MB together"


def _largest(made: Mapping[str, Any]) -> str:
  if "largest" not in made:
    return "-"
  most = made["largest"]
  return f"{most['rows']:,} ({most['rows_a_chip']:,})"


def table(result: Mapping[str, Any]) -> Table:
  shown = Table(title=title(result))
  shown.add_column("one chip")
  for method in result["methods"]:
    shown.add_column(method, justify="right")
  for name, texts in rows(result):
    shown.add_row(name, *texts)
  return shown


def title(result: Mapping[str, Any]) -> str:
  first = next(iter(result["methods"].values()))
  mesh = ", ".join(f"{k}={v}" for k, v in first["mesh"].items())
  return (
    f"{result['model']}, {first['length']} tokens a row, {first['dtype']}, on"
    f" {result['topology']} ({result['devices']} x {result['chip']},"
    f" {first['room'] / 2**30:.0f} GiB each; {mesh})"
  )


def notes(result: Mapping[str, Any]) -> str:
  return (
    "To train there, on every host at once, with a folder that all see:\n"
    f"  {result['run']} --workdir=FOLDER"
  )


def markdown(result: Mapping[str, Any]) -> str:
  """The table as a docs page has it."""
  methods = list(result["methods"])
  lines = [
    f"**{title(result)}**",
    "",
    f"| one chip | {' | '.join(methods)} |",
    f"| --- |{' ---: |' * len(methods)}",
    *(f"| {name} | {' | '.join(texts)} |" for name, texts in rows(result)),
  ]
  return "\n".join(lines)
