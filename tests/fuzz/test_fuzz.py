"""The short form of `python -m tests.fuzz`: a few harmed files of each kind."""

import re
import tempfile

import pytest

from tests.fuzz import harness
from tests.fuzz.harness import FINE, PACKAGE, ROOT, Sandbox
from tests.fuzz.readers import READERS

pytestmark = pytest.mark.slow
EACH = 4  # mutations of each reader
# These read by the code of others that are tried, and take long to set up.
SIMILAR = {
  *("model roberta", "model distilbert", "model modernbert", "model qwen2"),
  *("model mistral", "model qwen3", "model dinov2", "GGUF gpt2", "PEFT lora"),
  *("adapter randlora", "adapter unilora", "adapter vera+bitfit"),
}
QUICK = [name for name in READERS if name not in SIMILAR]
DOOR = {"open_file", "check_file", "read_bytes", "read_json"}
# What reads once more what a reader has read, or what this process wrote.
ASIDE = {
  "export/hf.py",
  "adapters/push.py",
  "sweep/launchers/process.py",
  "train/profile.py",
}


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory):
  """One for each reader, which has read its clean files."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HOME", "")  # to come back in the end
    patch.setenv("TMPDIR", "")
    patch.setattr(tempfile, "tempdir", None)
    folder = tmp_path_factory.mktemp("fuzz")
    made = {name: Sandbox(folder / name, name) for name in QUICK}
    for sandbox in made.values():
      sandbox.read_clean()  # imports and compiles
      assert sandbox.read_clean().outcome == FINE
    yield made


@pytest.mark.parametrize("reader", QUICK)
def test_harmed_files_are_refused_or_read(reader, sandboxes):
  for number in range(EACH):
    attempt = sandboxes[reader].attempt(number)
    assert not attempt.is_finding, attempt


def test_every_module_that_opens_files_from_elsewhere_has_a_reader(sandboxes):
  opening = set()
  for file in (ROOT / "vera_jax").rglob("*.py"):
    words = {*re.findall(r"\w+", file.read_text())}
    if words & DOOR and file.name != "files.py":
      opening.add(str(file).removeprefix(PACKAGE))
  assert opening - harness.callers - ASIDE == set()
