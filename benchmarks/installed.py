"""What `pip install vera_jax` puts on the disk, package by package.

  python -m venv PLAIN
  PLAIN/bin/pip install .
  PLAIN/bin/python benchmarks/installed.py

Prints a row for each package of the interpreter's environment, the largest
first: MB (10^6 bytes) of its files, compiled ones included, and those
requirements of vera_jax that need it. Imports only what is in such an
environment.
"""

from importlib.metadata import Distribution, distributions
from importlib.util import cache_from_source
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "vera-jax"
SHOWN = 1.0  # MB; smaller packages are in one row


def size(distribution: Distribution) -> float:
  """MB of the files that a distribution has installed."""
  files = distribution.files or ()
  paths = {Path(str(distribution.locate_file(file))) for file in files}
  # not every installer lists what it has compiled
  sources = [path for path in paths if path.suffix == ".py"]
  paths |= {Path(cache_from_source(path)) for path in sources}
  return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def requirements(distribution: Distribution) -> list[str]:
  """What a distribution requires here, of its extras nothing."""
  lines = map(Requirement, distribution.requires or ())
  return [
    canonicalize_name(line.name)
    for line in lines
    if line.marker is None or line.marker.evaluate({"extra": ""})
  ]


def main() -> None:
  installed = {str(canonicalize_name(x.name)): x for x in distributions()}

  def reached(name: str) -> set[str]:
    """A package and all that it needs."""
    names, waiting = set(), [name]
    while waiting:
      if (name := waiting.pop()) in installed and name not in names:
        names.add(name)
        waiting += requirements(installed[name])
    return names

  needs = {name: reached(name) for name in requirements(installed[PACKAGE])}
  sizes = {name: size(x) for name, x in installed.items()}
  rows = sorted(sizes, key=lambda name: (-sizes[name], name))
  print("| package | MB | needed by |\n| --- | ---: | --- |")
  for name in rows:
    if sizes[name] >= SHOWN:
      users = sorted(user for user, all_of in needs.items() if name in all_of)
      print(f"| {name} | {sizes[name]:.1f} | {', '.join(users)} |")
  others = [sizes[name] for name in rows if sizes[name] < SHOWN]
  print(f"| {len(others)} others | {sum(others):.1f} | |")
  print(f"| all | {sum(sizes.values()):.1f} | |")


if __name__ == "__main__":
  main()
