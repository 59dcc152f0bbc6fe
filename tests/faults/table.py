"""The table of programs and faults, made from what was tried."""

from collections.abc import Iterable, Mapping
from typing import Any

PROGRAMS = {
  "classifier": "classifier",
  "ensemble": "ensemble",
  "decoder": "decoder",
  "quantised": "quantised run",
  "sweep": "sweep",
  "submitit": "sweep by submitit",
  "ray": "sweep by Ray",
  "server": "server",
  "four": "four processes",
}
KILLED, SLEPT, TWICE = "killed", "slept", "twice"
SAVING, HARMED, CHANGED = "saving", "harmed", "changed"
CLOCK, REMOVED, ONE, RESIZED = "clock", "removed", "one", "resized"
FAULTS = {
  KILLED: "kill -9 at random moments",
  SLEPT: "SIGSTOP for longer than a lease, then SIGCONT",
  TWICE: "two at once on one folder, or one port",
  SAVING: "SIGTERM in the middle of a save, or of answers",
  HARMED: "a save harmed at rest",
  CHANGED: "data or base changed before it goes on",
  CLOCK: "the clock jumps by a day, either way",
  REMOVED: "files removed while it runs",
  ONE: "one of its processes slowed, stopped, out of memory or disk, cut off",
  RESIZED: "goes on with other numbers of processes",
}
ALONE = "it is one process"
JOBS = (
  "a process that trains a part of a sweep trains it alone, or by"
  " `--hosts=N` as four processes do"
)
CANNOT: dict[tuple[str, str], str] = {
  **{(name, ONE): ALONE for name in list(PROGRAMS)[:4]},
  **{(name, ONE): JOBS for name in ("sweep", "submitit", "ray")},
  **{(name, RESIZED): JOBS for name in ("sweep", "submitit", "ray")},
  ("server", HARMED): "a server saves nothing",
  ("server", ONE): ALONE,
  ("server", RESIZED): ALONE,
}
REFUSED = "refused"  # how what was seen begins, where that is the answer


def matrix(rows: Iterable[Mapping[str, Any]]) -> str:
  """A line for each fault, a column for each program, in Markdown."""
  cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for row in rows:
    cells.setdefault((row["program"], row["kind"]), []).append(row)
  reasons: list[str] = []
  lines = [
    f"| fault | {' | '.join(PROGRAMS.values())} |",
    "| --- |" + " --- |" * len(PROGRAMS),
  ]
  for kind, fault in FAULTS.items():
    line = [fault]
    for program in PROGRAMS:
      line.append(_cell(cells.get((program, kind), []), program, kind, reasons))
    lines.append(f"| {' | '.join(line)} |")
  notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, 1)]
  return "\n".join([*lines, "", *notes])


def _cell(
  rows: list[Mapping[str, Any]], program: str, kind: str, reasons: list[str]
) -> str:
  """What was seen, in a few words; a reason gets a number."""
  if reason := CANNOT.get((program, kind)):
    if reason not in reasons:
      reasons.append(reason)
    return f"can't be ({reasons.index(reason) + 1})"
  tried, lost = (sum(row[key] for row in rows) for key in ("tried", "lost"))
  if not tried:
    return "not tried"
  if lost:
    return f"**{min(lost, tried)} of {tried} lost**"
  refused = sum(row["tried"] for row in rows if row["seen"].startswith(REFUSED))
  words = [f"shown {tried - refused}×"] if tried > refused else []
  words += [f"refused {refused}×"] if refused else []
  return ", ".join(words)
