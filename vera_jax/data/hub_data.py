"""Data sets from the Hugging Face hub, by way of `datasets`.

The library retries for long when there is no network, so the hub is asked
once first, with a time limit, and a hub that doesn't answer is an error at
once.
"""

from functools import partial
from pathlib import Path
from typing import Any

from vera_jax import hub
from vera_jax.data.tables import Table, class_names
from vera_jax.errors import UserError, install

ANSWER_SECONDS = 10.0
# The errors of a download that broke off; the library's other ones are about
# the data set itself.
_BROKE_OFF = (ConnectionError, TimeoutError, EOFError)


def download(source: str, name: str | None) -> Any:
  """The hub's DatasetDict of a data set, or of one of several by its name.

  Raises:
    UserError: it isn't there, the hub can't be reached, or `datasets` isn't
      installed.
  """
  try:
    import datasets
  except ImportError as lacking:
    raise UserError(
      f"There is no file or folder {source} here. If it is a data set of the"
      f" hub's, that needs datasets: {install('datasets')}. Or name a file or"
      " folder of it."
    ) from lacking
  from huggingface_hub import HfApi
  from huggingface_hub.errors import RepositoryNotFoundError

  not_there = UserError(
    f"There is no file or folder {source} here, and the hub has no data set of "
    "that name (or not for you). Check the name; or download the data, and "
    "name the file or the folder."
  )
  offline = datasets.config.HF_HUB_OFFLINE
  cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
  # An earlier download may serve when the hub doesn't answer.
  if not offline and not (cache / source.replace("/", "___")).is_dir():
    ask = partial(HfApi().dataset_info, source, timeout=ANSWER_SECONDS)
    error = hub.call_error(ask, seconds=1.5 * ANSWER_SECONDS)
    if isinstance(error, RepositoryNotFoundError):
      raise not_there from error
    if error is not None:
      raise hub.unreachable(source, error) from error
  fetch = partial(datasets.load_dataset, source, name)
  shown = f"{source} ({name})" if name else source
  try:
    with hub.downloading(shown, broken=() if offline else _BROKE_OFF):
      return fetch()
  except datasets.exceptions.DatasetNotFoundError as error:
    raise not_there from error
  except ConnectionError as error:
    raise hub.unreachable(source, error) from error
  except (OSError, ValueError, RuntimeError) as error:
    what = name or "it"
    raise UserError(f"{what} can't be loaded from {source}: {error}") from error


def hub_table(source: str, split: str, rows: Any) -> Table:
  """The rows of a split of `download(source, …)`, numbered from 1."""
  return Table(
    name=f"{source} ({split})",
    columns={column: list(rows[column]) for column in rows.column_names},
    numbers=list(range(1, len(rows) + 1)),
    classes=class_names(rows.features.to_dict()),
    lines=False,
  )
