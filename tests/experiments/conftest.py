import importlib
import inspect
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import experiments

# They stay imported: absl knows those whose flags belong to the script by id(),
# which another module would get after them.
SHARED = "cli", "decoding"


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
      if name.removeprefix("experiments.") not in SHARED:
        del sys.modules[name]
    for name, value in list(vars(experiments).items()):
      if inspect.ismodule(value) and name not in SHARED:
        delattr(experiments, name)
    argv = [script, *map(str, words)]
    monkeypatch.setattr(sys, "argv", argv)  # where a config's keys are found
    module = importlib.import_module(f"experiments.{script}")
    with flagsaver.flagsaver():
      operands = flags.FLAGS(argv)[1:]
      # a command that trains has the main function of them all
      main = (module if hasattr(module, "main") else module.train).main
      takes = inspect.signature(main).parameters
      main(*([operands] if takes else []))

  yield run
  # a config file is loaded into the module of the one before it
  sys.modules.pop("config_config", None)
