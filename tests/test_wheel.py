"""What `pip install` of the wheel gives: the commands, in any folder.

The wheel is built once, from copies of the files that git knows, and installed
without what it depends on, which this interpreter has.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = "vera_jax/_commands/"
BUILD = """
import sys
from setuptools.build_meta import build_wheel
build_wheel(sys.argv[1])
"""

pytestmark = pytest.mark.slow


def call(*words: object, cwd: Path, **environment: str) -> str:
  """The standard output of a command that ends well."""
  done = subprocess.run(
    list(map(str, words)),
    cwd=cwd,
    capture_output=True,
    text=True,
    env={**os.environ, **environment},
    timeout=600,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  return done.stdout


@pytest.fixture(scope="module")
def known() -> list[str]:
  """The files that git knows, or will once they are committed."""
  flags = "--cached", "--others", "--exclude-standard", "--deduplicate"
  listed = call("git", "ls-files", *flags, cwd=ROOT).splitlines()
  return [file for file in listed if (ROOT / file).is_file()]


@pytest.fixture(scope="module")
def wheel(known, tmp_path_factory) -> Path:
  source = tmp_path_factory.mktemp("source")
  folders = "vera_jax/", "experiments/", "configs/"
  for file in known:
    if "/" not in file or file.startswith(folders):
      (source / file).parent.mkdir(parents=True, exist_ok=True)
      (source / file).write_bytes((ROOT / file).read_bytes())
  call(sys.executable, "-c", BUILD, source / "dist", cwd=source)
  (built,) = (source / "dist").glob("*.whl")
  return built


def test_the_wheel_is_the_package_with_the_commands_below_it(wheel, known):
  with zipfile.ZipFile(wheel) as archive:
    names = {x for x in archive.namelist() if ".dist-info/" not in x}
  expected = {x for x in known if x.startswith("vera_jax/")}
  expected |= {
    COMMANDS + x for x in known if x.startswith(("experiments/", "configs/"))
  }
  assert names == expected


def test_installed_commands_train_predict_and_merge(
  wheel, tiny_model, tmp_path
):
  target, empty = tmp_path / "installed", tmp_path / "empty"
  empty.mkdir()
  pip = sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"
  call(*pip, "--quiet", "--target", target, wheel, cwd=empty)
  rows = [f"word{i},{('no', 'yes')[i % 2]}" for i in range(16)]
  (empty / "a.csv").write_text("\n".join(["text,label", *rows, ""]))

  # one device, for which less is compiled than for the suite's eight
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
  alone = {"PYTHONPATH": str(target), "XLA_FLAGS": flags}

  def vera_jax(*words: object) -> str:
    return call(target / "bin" / "vera-jax", *words, cwd=empty, **alone)

  # nothing of the checkout is on the path
  where = "import vera_jax; print(vera_jax.__file__)"
  printed = call(sys.executable, "-c", where, cwd=empty, **alone)
  assert printed.startswith(str(target))
  vera_jax(
    "train",
    "--config=text",
    "--config.data.train=a.csv",
    f"--config.model.name={tiny_model}",
    f"--config.data.cache_dir={tmp_path / 'tokens'}",
    "--config.optim.epochs=1",
    "--config.optim.batch_size=4",
    "--config.vera.rank=4",
    "--workdir=run",
  )
  result = json.loads((empty / "run/result.json").read_text())
  assert result["method"] == "vera"
  (empty / "b.csv").write_text("text\nword1\nword2\n")
  ask = "--adapter=run/adapter", "--input=b.csv", "--format=jsonl"
  answers = [json.loads(x) for x in vera_jax("predict", *ask).splitlines()]
  assert [answer["label"] in ("no", "yes") for answer in answers] == [True] * 2
  vera_jax("merge", "--adapter=run/adapter", "--out=merged")
  assert (empty / "merged/model.safetensors").is_file()
