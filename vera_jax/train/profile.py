"""A trace of some steps: what ran when, on each device (docs/profile.md).

Each process traces itself, into profile/plugins/profile/steps-FIRST-LAST of the
run's folder, where xprof and TensorBoard look for the hosts of one trace.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from vera_jax.errors import UserError

FOLDER = "profile"  # of a run's folder


def steps_in(text: str | None) -> range:
  """The steps that FIRST:LAST names, counted from 1, both included; or none.

  Raises:
    UserError: it is nothing of this form.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r"(\d+):(\d+)", str(text))
  if not match or not 1 <= int(match[1]) <= int(match[2]):
    raise UserError(
      f"config.log.profile is {text!r}; give the first and the last step to"
      " trace, counted from 1, as in --profile=10:15."
    )
  return range(int(match[1]), int(match[2]) + 1)


class Profile:
  """The trace of a run's training. Use as a context."""

  def __init__(self, steps: str | None, folder: Path, end: int) -> None:
    """Trace the steps FIRST:LAST of `end`, if any, into the run's folder.

    Raises:
      UserError: the run has no such steps.
    """
    self._steps = steps_in(steps)
    if self._steps and self._steps[-1] > end:
      raise UserError(
        f"--profile={steps} names steps that are not the run's: it has {end}."
      )
    name = f"steps-{str(steps).replace(':', '-')}"
    self._folder = folder / FOLDER / "plugins" / "profile" / name
    self._trace: tempfile.TemporaryDirectory[str] | None = None

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *exc: object) -> None:
    self.stop()  # the training may have ended amid the steps

  @contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Around a step, which is traced if it is one of those."""
    if number not in self._steps:
      yield
      return
    if self._trace is None:
      self._trace = tempfile.TemporaryDirectory()
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Python's calls would slow down others
      jax.profiler.start_trace(self._trace.name, profiler_options=options)
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def is_last(self, number: int) -> bool:
    """Whether the trace is to be stopped once this step is done."""
    return self._trace is not None and number == self._steps[-1]

  def stop(self) -> None:
    """Write the trace, if there is one, to the run's folder."""
    if self._trace is None:
      return
    with self._trace as written:
      self._trace = None
      jax.profiler.stop_trace()
      self._folder.mkdir(parents=True, exist_ok=True)
      for kind in ("xplane.pb", "trace.json.gz"):
        (file,) = Path(written).rglob(f"*.{kind}")
        copy = self._folder / f"process{jax.process_index()}.{kind}"
        copy.write_bytes(file.read_bytes())
