import importlib
import inspect
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import experiments


@pytest.fixture
def typed(monkeypatch):
  """Calls a script's `main` with the words given, in this process."""

  def run(script, *words):
    # other scripts, which were imported before, have flags of the same names
    for module, found in flags.FLAGS.flags_by_module_dict().items():
      if module.startswith(("experiments.", "benchmarks.", "tests.")):
        for flag in list(found):
          delattr(flags.FLAGS, flag.name)
    for name in [x for x in sys.modules if x.startswith("experiments.")]:
      if name != "experiments.cli":
        del sys.modules[name]
        monkeypatch.delattr(experiments, name.split(".")[1], raising=False)
    argv = [script, *map(str, words)]
    monkeypatch.setattr(sys, "argv", argv)  # where a config's keys are found
    module = importlib.import_module(f"experiments.{script}")
    with flagsaver.flagsaver():
      operands = flags.FLAGS(argv)[1:]
      takes = inspect.signature(module.main).parameters
      module.main(*([operands] if takes else []))

  return run
