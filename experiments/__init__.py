"""Scripts: flags and configs in, `vera_jax` does the work."""

import sys
from types import TracebackType


def _say_stopped(
  kind: type[BaseException],
  error: BaseException,
  trace: TracebackType | None,
) -> None:
  """Ctrl-C while modules are imported, which `cli.run` can't catch."""
  if issubclass(kind, KeyboardInterrupt):
    print("Stopped.", file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_stopped
