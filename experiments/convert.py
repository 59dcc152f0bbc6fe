"""What the converters of weights share: the file to read, the folder to write.

vera_jax reads Hugging Face folders and GGUF files. A few networks come in
Python packages and in other formats: `make images` and `make networks` convert
them, once, to a folder with config.json and model.safetensors in networks/, at
the top of the checkout.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.files import make_folder, sha256_of

NETWORKS = Path(__file__).parents[1] / "networks"


def package_file(package: str, path: str, *, sha256: str) -> Path:
  """A file of an installed package, if it is the one that is known here.

  Args:
    package: the distribution's name; nothing of it is imported.
    path: of the file inside it.
    sha256: the file's checksum.

  Raises:
    UserError: the package is not installed, or its file is another one.
  """
  try:
    file = Path(str(distribution(package).locate_file(path)))
  except PackageNotFoundError as error:
    raise UserError(
      f"The package {package} is not installed: make images networks"
    ) from error
  if (actual := sha256_of(file)) != sha256:
    raise UserError(
      f"{file} is not the file that is known here: its sha256 is {actual}."
    )
  return file


def convert(folder: Path, fill: Callable[[Path], Any]) -> None:
  """Let `fill` write a network's folder, unless there is one."""
  if folder.exists():
    print(f"{folder} is there already; remove it to convert again.")
    return
  make_folder(folder, fill)
  print(folder)
