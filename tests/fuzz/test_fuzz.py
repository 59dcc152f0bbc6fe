"""The short form of `python -m tests.fuzz`: a few harmed files of each kind."""

import ast
import subprocess
import sys
import tempfile

import pytest

from experiments import console
from tests.fuzz import harness
from tests.fuzz.commands import COMMANDS
from tests.fuzz.harness import FINE, FOUND, PACKAGE, ROOT, Sandbox
from tests.fuzz.readers import READERS
from vera_jax.adapters.methods import METHODS
from vera_jax.data import tables
from vera_jax.models.family import FAMILIES, TEXT_PARTS
from vera_jax.models.gguf_folder import ARCHITECTURES
from vera_jax.peft_io.forms import FORMS

pytestmark = pytest.mark.slow
EACH = 4  # mutations of each reader
# Of each kind whose files are read by the same code, those that are tried here:
# setting up takes long.
TRIED = {
  "model": ("bert", "gpt2", "llama", "gemma3", "vit", "shards", "merged"),
  "adapter": ("vera", "lora"),
  "PEFT": ("vera", "dora"),
  "GGUF": ("llama", "in parts", "adapter"),
}
QUICK = [
  name
  for name in READERS
  for kind, _, which in [name.partition(" ")]
  if which in TRIED.get(kind, (which,))
]
# What opens a file that comes from elsewhere, and checks what it is.
DOOR = {"open_file", "check_file", "read_bytes", "read_json", "sha256_of"}
DOOR |= {"open_parquet"}
# Functions that a reader's files do not lead to, and why.
ASIDE = {
  "adapters/push.py:push_adapter": "what load_adapter has read, to the hub",
  "export/hf.py:_write": "the files of a folder that was read, copied",
  "peft_io/gguf.py:export_gguf_adapter": "settings that it has just written",
  "train/logging.py:WeightsAndBiases.__init__": "wandb is not installed",
}


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory):
  """One for each reader, which has read its clean files."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HOME", "")  # to come back in the end
    patch.setenv("TMPDIR", "")
    patch.setattr(tempfile, "tempdir", None)
    folder = tmp_path_factory.mktemp("fuzz")
    names = {*QUICK, *(kept.parent.name for kept in FOUND.glob("*/*"))}
    made = {name: Sandbox(folder / name, name) for name in sorted(names)}
    for sandbox in made.values():
      sandbox.read_clean()  # imports and compiles
      assert sandbox.read_clean().outcome == FINE
    yield made


@pytest.mark.parametrize("reader", QUICK)
def test_harmed_files_are_refused_or_read(reader, sandboxes):
  for number in range(EACH):
    attempt = sandboxes[reader].attempt(number)
    assert not attempt.is_finding, attempt


@pytest.mark.parametrize("kept", sorted(FOUND.glob("*/*")))
def test_what_was_found_once_is_no_finding_any_more(kept, sandboxes):
  attempt = sandboxes[kept.parent.name].again(kept)
  assert not attempt.is_finding, attempt


def opening() -> set[str]:
  """The package's functions that use a door, as "models/family.py:read"."""
  functions: list[tuple[str, ast.AST]] = []
  for file in (ROOT / "vera_jax").rglob("*.py"):
    where = str(file).removeprefix(PACKAGE)
    for node in ast.parse(file.read_text()).body:
      inside = node.body if isinstance(node, ast.ClassDef) else [node]
      above = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
      functions += [
        (f"{where}:{above}{one.name}", one)
        for one in inside
        if isinstance(one, ast.FunctionDef) and where != "files.py"
      ]
  return {
    name
    for name, function in functions
    for node in ast.walk(function)
    if isinstance(node, ast.Name) and node.id in DOOR
  }


def test_every_function_of_every_module_that_opens_files_is_tried(sandboxes):
  assert opening() - harness.callers - ASIDE.keys() == set()
  assert ASIDE.keys() <= opening() - harness.callers


def test_each_family_method_and_format_has_a_reader():
  families = {FAMILIES[name] for name in FAMILIES if f"model {name}" in READERS}
  assert families == {*FAMILIES.values()}
  held = {form.removeprefix("PEFT ") for form in READERS if "PEFT" in form}
  assert held == {*FORMS, "dora"}
  for kind, names in (
    ("model", TEXT_PARTS),
    ("adapter", METHODS),
    ("GGUF", ARCHITECTURES),
    ("table", tables.FORMATS),
  ):
    assert {f"{kind} {name}" for name in names} <= READERS.keys()


def test_commands_that_are_mistyped_starved_and_interrupted():
  words = [sys.executable, "-m", "tests.fuzz.commands", "--quick", "--count=8"]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_is_one_of_those():
  given = {line.split()[0] for line in COMMANDS}
  given.add("quickstart")  # has no words to change, and trains for a minute
  assert given == {*console.COMMANDS, *console.OTHERS, "help"}
