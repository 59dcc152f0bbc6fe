"""What the scripts share: flags, errors for a person, the closing table."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from vera_jax.errors import UserError


def run(main: Callable[[], None], *, usage: str | None) -> None:
  """Parse the flags and call `main`; users' mistakes end without traceback.

  Exit codes: 0 done, 1 a mistake in input or data, 2 in the flags, 75 stopped
  by Ctrl-C or SIGTERM and saved.
  """
  sys.modules["__main__"].__doc__ = usage  # what --help shows first

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(_complain(f"Not a flag: {' '.join(argv[1:])}", 2))
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # orbax tells of each save
    sys.exit(_guard(main))

  app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  try:
    return app.parse_flags_with_usage(argv)
  except (KeyError, AttributeError, ValueError, TypeError, OSError) as error:
    text = error.args[0] if len(error.args) == 1 else error
    sys.exit(_complain(f"{text}", 2))


def _guard(main: Callable[[], None]) -> int:
  try:
    main()
  except UserError as error:
    return _complain(str(error), 1)
  except Exception as error:
    from vera_jax.train.interrupt import EXIT_CODE, Interrupted

    if isinstance(error, Interrupted):
      return _complain(str(error), EXIT_CODE)
    raise
  except KeyboardInterrupt:
    return _complain("Stopped.", 130)
  return 0


def _complain(text: str, code: int) -> int:
  print(text, file=sys.stderr)
  return code


def default_workdir(config: ConfigDict) -> Path:
  """One folder a config: the same settings find the same run again."""
  from vera_jax.workdir import bound

  text = json.dumps(bound(config.to_dict()), sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  name = f"{config.method}-seed{config.seed}-{digest}"
  return Path("runs") / str(config.task) / name


def show_result(result: Mapping[str, Any], workdir: Path | str) -> None:
  """The result's main figures as a table on standard output."""
  table = Table(title=f"{result['task']}, {result['method']}", min_width=48)
  table.add_column("")
  table.add_column("best epoch", justify="right")
  table.add_column("last epoch", justify="right")
  best, last = result["best"], result["last"]
  table.add_row("epoch", str(best["epoch"]), str(last["epoch"]))
  for name, value in best["metrics"].items():
    table.add_row(name, f"{value:.4f}", f"{last['metrics'][name]:.4f}")
  table.add_section()
  parameters = result["parameters"]
  table.add_row("adapter parameters", f"{parameters['adapter']:,}", "")
  table.add_row("head parameters", f"{parameters['head']:,}", "")
  table.add_row("seconds", f"{result['seconds']:.0f}", "")
  console = Console()
  console.print(table)
  console.print(f"{workdir}", markup=False, highlight=False)


__all__ = ["UserError", "default_workdir", "flags", "run", "show_result"]
