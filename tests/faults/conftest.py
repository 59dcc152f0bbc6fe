"""The launcher of the fault tests, and its run that nothing happens to."""

import pytest

from tests.faults.fixtures import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Launcher:
  folder = tmp_path_factory.mktemp("faults")
  return Launcher(folder, epochs=3, dropout=False)


@pytest.fixture(scope="session")
def alone(launcher):
  return launcher.run_alone()
