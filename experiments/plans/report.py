"""What a plan's file says of itself, its table, and the docs made from it."""

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from ml_collections import ConfigDict
from rich.table import Column, Table

from experiments.markdown import markdown_table
from experiments.plans.chips import Pod
from vera_jax.errors import UserError
from vera_jax.results import provenance

NONE = "none: none fits; --rows=N plans microbatches of fewer rows"
KINDS = {
  "base": "base",
  "projections": "A, B",
  "trainables": "trainables",
  "optimiser": "optimiser",
  "gradients": "gradients between microbatches",
}


def metadata(
  config: ConfigDict,
  pod: Pod,
  words: str,
  mesh: Mapping[str, int] | None = None,
) -> dict[str, Any]:
  """What was planned, on what, by which command, and what trains there.

  The training command has the same settings, and is the same on every host.
  With `mesh` it has the sizes of that, which was searched.
  """
  settings = [
    word
    for word in shlex.split(words)
    if word.lstrip("-").startswith(("config", "seeds"))
  ]
  settings += [
    f"--config.mesh.{axis}={mesh[axis]}"
    for axis in ("fsdp", "tensor")
    if mesh and mesh[axis] > 1
  ]
  return {
    "model": config.model.name,
    "task": config.task,
    "topology": pod.name,
    "chip": pod.kind,
    "devices": len(pod.devices),
    "command": f"python -m experiments.plan {words}",
    "run": shlex.join(["vera-jax", "train", *settings]),
    "versions": provenance()["versions"],
  }


def rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
  """The table's rows: a name, and a text for each method."""

  def stored(kind: str, made: Mapping[str, Any]) -> str:
    return _megabytes(made["bytes"][kind])

  def teraflop(made: Mapping[str, Any], chips: int) -> str:
    if "flops" not in made:
      return "-"
    return f"{made['flops']['a_chip'] * chips / 1e12:.3f}"

  def all_chips(made: Mapping[str, Any]) -> str:
    return teraflop(made, math.prod(made["mesh"].values()))

  def largest(made: Mapping[str, Any]) -> str:
    if "largest" not in made:
      return "-"
    most = made["largest"]
    return f"{most['rows']:,} ({most['rows_a_chip']:,})"

  def mesh(made: Mapping[str, Any]) -> str:
    sizes = made["mesh"]
    return f"{sizes['data']} × {sizes['fsdp']} × {sizes['tensor']}"

  def peak(made: Mapping[str, Any]) -> str:
    return _megabytes(made.get("peak"))

  def seconds(made: Mapping[str, Any]) -> str:
    if "bound" not in made:
      return "-"
    return f"{made['bound']:.3g} ({_binding(made)})"

  # what older files lack has no row
  methods = result["methods"].values()
  newer = [made for made in methods if "checkpoint" in made]
  newest = [made for made in methods if "peak" in made]
  texts: dict[str, Callable[[Any], str]] = {
    **({"mesh: data × fsdp × tensor": mesh} if newer else {}),
    "rows per batch (per chip)": _rows,
    **{f"MB {name}": partial(stored, kind) for kind, name in KINDS.items()},
    "MB temporaries": lambda m: _megabytes(m.get("temporaries")),
    **({"MB at once, at most": peak} if newest else {}),
    "MB in all, as laid out": lambda m: _megabytes(m["total"]),
    "fits": lambda m: "yes" if m["fits"] else "NO",
    "TFLOP per step and chip": lambda m: teraflop(m, 1),
    "TFLOP per step, all chips": all_chips,
    "all-reduces per step": _all_reduces,
    "other collectives": _others,
    **(
      {
        "GB received per step": lambda m: (
          f"{m['wire'] / 1e9:.2f}" if "wire" in m else "-"
        ),
        "seconds per step, at least (bound by)": seconds,
        "MB of a checkpoint": lambda m: _megabytes(m["checkpoint"]),
      }
      if newer
      else {}
    ),
    "largest batch, rows (per chip)": largest,
    "programs compiled (XLA's effort)": lambda m: (
      f"{m['compiles']} ({m['effort']:+.0f})"
    ),
  }
  for name, text in texts.items():
    yield [name, *map(text, result["methods"].values())]


def _rows(made: Mapping[str, Any]) -> str:
  text = f"{made['rows']} ({made['rows_a_chip']})"
  parts = made.get("microbatches", 1)
  return text if parts == 1 else f"{text} in {parts} microbatches"


def _binding(made: Mapping[str, Any]) -> str:
  """What a step's bound in seconds comes from."""
  return max(made["seconds"], key=made["seconds"].get)


def _megabytes(size: int | None) -> str:
  if size is None:
    return "-"
  return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.3f}"


def _all_reduces(made: Mapping[str, Any]) -> str:
  """Each as times × bytes and type; those in a loop are marked."""
  sent = [
    f"{one['times']} × {one['bytes']:,} B {'/'.join(one['types'])}"
    + (" in a loop" if one["looped"] else "")
    for one in made.get("collectives", [])
    if one["kind"] == "all-reduce"
  ]
  return ", ".join(sent) or "none"


def _others(made: Mapping[str, Any]) -> str:
  sent = [
    one for one in made.get("collectives", []) if one["kind"] != "all-reduce"
  ]
  if not sent:
    return "none"
  size = sum(one["times"] * one["bytes"] for one in sent)
  return f"{sum(one['times'] for one in sent)} of {size / 1e6:,.1f} MB together"


def leanest(methods: Mapping[str, Any]) -> str:
  """The column of fewest FLOPs a chip, of those that fit; of equal ones, to a
  thousandth, the one that splits the runs most."""
  costs = {
    name: (float(f"{made['flops']['a_chip']:.3g}"), -made["mesh"]["runs"])
    for name, made in methods.items()
    if made["fits"]
  }
  return min(costs, key=lambda name: costs[name], default=NONE)


def title(result: Mapping[str, Any]) -> str:
  first = next(iter(result["methods"].values()))
  mesh = ", ".join(f"{k}={v}" for k, v in first["mesh"].items())
  if runs := result.get("runs"):
    mesh = f"{runs} runs"
  return (
    f"{result['model']}, {first['length']} tokens per row, {first['dtype']}, on"
    f" {result['topology']} ({result['devices']} × {result['chip']},"
    f" {first['room'] / 2**30:.0f} GiB each; {mesh})"
  )


def table(result: Mapping[str, Any]) -> Table:
  methods = (Column(name, justify="right") for name in result["methods"])
  shown = Table("one chip", *methods, title=title(result))
  for texts in rows(result):
    shown.add_row(*texts)
  return shown


def markdown(result: Mapping[str, Any]) -> str:
  """The table as a docs page has it."""
  drawn = markdown_table(["one chip", *result["methods"]], rows(result))
  return f"**{title(result)}**\n\n{drawn}"


def at_scale(results: Iterable[Mapping[str, Any]]) -> str:
  """One table of several plans, a row for each method.

  Raises:
    UserError: a plan has no frozen network, against which FLOPs are held.
  """
  columns = (
    *("model", "chips", "data × fsdp × tensor", "rows × tokens", "method"),
    *("GiB a chip (laid out)", "FLOPs over frozen", "GB received"),
    *("MB of a checkpoint", "seconds at least"),
  )
  lines = []
  for result in results:
    methods = result["methods"]
    if "frozen" not in methods:
      raise UserError(f"{result['command']}: plan the frozen network too.")
    for name, made in methods.items():
      sizes = [made["mesh"][axis] for axis in ("data", "fsdp", "tensor")]
      total = f"{made['total'] / 2**30:.2f}" if made["total"] else "too much"
      if made["fits"]:
        total = f"{made['peak'] / 2**30:.2f} ({total})"
      line = [
        result["model"].rpartition("/")[2],
        result["topology"],
        " × ".join(map(str, sizes)),
        f"{made['rows']} × {made['length']:,}",
        name,
        total if made["fits"] else f"{total}: does not fit",
      ]
      if made["fits"]:
        frozen = methods["frozen"]["flops"]["a_chip"]
        line += [
          f"{made['flops']['a_chip'] / frozen:.3f}",
          f"{made['wire'] / 1e9:.1f}",
          _megabytes(made["checkpoint"]),
          f"{made['bound']:.2f} ({_binding(made)})",
        ]
      else:
        line += ["-", "-", _megabytes(made["checkpoint"]), "-"]
      lines.append(line)
  return markdown_table(columns, lines)
