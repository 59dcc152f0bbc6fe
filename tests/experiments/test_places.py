"""Every flag and field that names a file or folder takes gs://, or says by name
that it doesn't; other schemes are refused, and no folder `gs:` ever appears."""

import ast
import io
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from tests.experiments.command import ROOT
from vera_jax.errors import UserError
from vera_jax.places import list_files, local_copy, place, upload

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")

EXPERIMENTS = Path(ROOT, "experiments")
# Flags with texts that are no places, in all commands.
TEXTS = {
  *(
    "host",
    "name",
    "prompt",
    "to",
    "task",
    "dtype",
    "format",
    "model_id",
    "template",
    "width",
  ),
  *(
    "shard",
    "seeds",
    "profile",
    "topology",
    "launcher_options",
    "methods",
    "coordinator",
    "only",
    "sweeps",
  ),
}
RTE = f"--config={ROOT}/configs/rte.py"
SWEEP = f"--config={ROOT}/configs/sweeps/rank.py:minilm"
GOOGLES = ["--bucket=x", "--project=x", "--zone=x"]
LAUNCH = ["--to=slurm", "--command=glue", "--topology=gpu:1x1"]
RIDGE = f"--config={ROOT}/configs/images/cifar10.py:dinov2"
# By command: its other flags, {} for an adapter that is there, and the flags
# that are places; of those in LOCAL a store is refused.
PLACES = {
  "train": ([RTE], ["workdir"]),
  "sweep": ([SWEEP], ["workdir"]),
  "ridge": ([RIDGE], ["workdir"]),
  "predict": (["--input=-"], ["adapter", "model"]),
  "predict ": (["--adapter={}"], ["input"]),
  "predict  ": (["--adapter={}", "--input=-"], ["base"]),
  "generate": (["--prompt=a"], ["adapter", "model"]),
  "generate ": (["--adapter={}"], ["input"]),
  "generate  ": (["--adapter={}", "--prompt=a"], ["base"]),
  "chat": ([], ["adapter", "model"]),
  "chat ": (["--adapter={}"], ["base"]),
  "serve": (["--port=0", "--adapters={}"], ["model", "token_file"]),
  "serve ": (["--port=0"], ["adapters"]),
  "answer": (["--adapter={}"], ["choices"]),
  "answer ": (["--adapter={}", "--out=x"], ["questions"]),
  "answer  ": (["--adapter={}", "--questions=x.jsonl"], ["out"]),
  "merge": (["--out=x"], ["adapter"]),
  "merge ": (["--adapter={}"], ["out"]),
  "merge  ": (["--adapter={}", "--out=x"], ["base"]),
  "merge   ": (["--format=gguf-f16", "--out=x"], ["model"]),
  "peft": (["export", "--adapter={}"], ["out"]),
  "peft ": (["export", "--out=x"], ["adapter"]),
  "peft  ": (["export", "--adapter={}", "--out=x"], ["base"]),
  "gguf": (["export", "--adapter={}"], ["out"]),
  "gguf ": (["export", "--out=x"], ["adapter"]),
  "gguf  ": (["export", "--adapter={}", "--out=x"], ["base"]),
  "gguf   ": (["export", "--out=x"], ["model"]),
  "push": (["--to=owner/name"], ["adapter"]),
  "report": ([f"{ROOT}/results/minilm/cola/vera-seed2"], ["out"]),
  "report ": (
    [f"{ROOT}/results/minilm/cola/vera-seed2", "--against=paper"],
    ["judgments"],
  ),
  "rehearse": ([], ["out"]),
  "rehearse ": (["--out=x"], ["tokenizers"]),
  "pictures": (["x"], ["out"]),
  "plan": ([RTE], ["out"]),
  "e2e_score": (["--outputs=x"], ["references"]),
  "e2e_score ": (["--references=x"], ["outputs"]),
  "launch": ([*GOOGLES, "--name=x", "--cluster=x", "--image=x"], ["out"]),
  "launch ": (LAUNCH, ["workdir"]),
  "launch  ": ([*LAUNCH, "--workdir=x"], ["env_file"]),
  "make_e2e": ([], ["out"]),
  "make_entailment": ([], ["out"]),
}
LOCAL = {("answer", "out"), ("make_e2e", "out"), ("make_entailment", "out")}
LOCAL |= {("rehearse", "out"), ("rehearse", "tokenizers")}
LOCAL |= {("launch", "env_file"), ("launch", "out")}
# The fields of configs that are places.
FIELDS = {
  *("data.source", "data.train", "data.dev", "data.cache_dir"),
  *("data.choices", "data.general", "model.name"),
}
NO_PLACES = {
  *(
    "class_weights",
    "cut",
    "dev_shots",
    "held_out",
    "image_size",
    "kind",
    "label",
    "labels",
  ),
  *("max_eval_examples", "max_length", "max_train_examples", "prompt"),
  *("template", "text"),
}


def flags_of(script: Path) -> set[str]:
  """The names of its flags that are texts or lists of them."""
  calls = [x for x in ast.walk(ast.parse(script.read_text()))]
  return {
    call.args[0].value
    for call in calls
    if isinstance(call, ast.Call)
    and call.args
    and isinstance(call.args[0], ast.Constant)
    and isinstance(call.func, ast.Attribute)
    and call.func.attr
    in ("DEFINE_string", "DEFINE_list", "DEFINE_multi_string")
  }


def test_each_flag_and_field_is_known_here():
  named: dict[str, set[str]] = {}
  for name, (words, flags) in PLACES.items():
    used = [word[2:].partition("=")[0] for word in words if word[:2] == "--"]
    named.setdefault(name.strip(), TEXTS | set()).update(flags, used)
  by_all = {"adapter", "model", "base"}  # of cli.define_model
  for script in EXPERIMENTS.glob("*.py"):
    flags = flags_of(script)
    flags -= {"coordinator"} | by_all if script.stem == "cli" else set()
    assert flags <= named.get(script.stem, TEXTS), script.stem
  fields = set()
  for name in ("instruct", "text", "language", "e2e", "rte", "images.cifar10"):
    data = import_module(f"configs.{name}").get_config().data
    texts = [k for k, v in data.items() if v in (None, ()) or type(v) is str]
    fields |= {f"data.{key}" for key in texts}
  assert fields <= FIELDS | {f"data.{name}" for name in NO_PLACES}


@pytest.fixture
def refused(typed, random_adapter, tmp_path, monkeypatch):
  """What a command says; it must leave no file where it was started."""
  adapter = random_adapter()
  monkeypatch.chdir(tmp_path)

  def run(name, *words):
    words = [word.replace("{}", str(adapter)) for word in words]
    with pytest.raises(UserError) as caught:
      typed(name.strip(), *words)
    assert not list(tmp_path.iterdir())
    return str(caught.value)

  return run


@pytest.mark.parametrize("name", PLACES)
def test_flags_refuse_other_schemes_by_name(name, refused):
  words, flags = PLACES[name]
  for flag in flags:
    if (name.strip(), flag) in LOCAL:
      said = refused(name, *words, f"--{flag}=gs://bucket/x")
      assert f"--{flag} is a path of this machine" in said
      continue
    for scheme in ("s3://b/x", "gs:/b/x") if flag != "input" else ("s3://b/x",):
      said = refused(name, *words, f"--{flag}={scheme}")
      assert f"{scheme} is no place" in said and "gs://BUCKET/NAME" in said


@pytest.mark.parametrize(
  "config, field",
  (
    ("rte", "data.source"),
    ("rte", "model.name"),
    ("rte", "data.cache_dir"),
    ("text", "data.source"),
    ("text", "data.train"),
    ("text", "data.dev"),
    ("language", "data.train"),
    ("language", "data.dev"),
    ("language", "data.general"),
    ("e2e", "data.source"),
    ("instruct", "data.source"),
    ("instruct", "data.choices"),
    ("images/cifar10", "data.source"),
  ),
)
def test_fields_refuse_other_schemes_by_name(
  config, field, refused, tiny_settings, tmp_path, tmp_path_factory
):
  data = tmp_path_factory.mktemp("data") / "train.csv"
  data.write_text("text,label\na,0\nb,1\n" * 20)
  settings = {"rte": tiny_settings, "text": {"data.train": data}}
  settings["language"] = settings["text"]
  rows = tmp_path_factory.mktemp("data") / "train.jsonl"
  row = '{"instruction": "%d", "input": "", "output": "b"}\n'
  rows.write_text("".join(row % number for number in range(20)))
  settings["instruct"] = {"data.source": rows, "data.dev_examples": 2}
  chosen = dict(settings.get(config, {}))
  chosen.pop(field, None)
  if field == "data.source":
    chosen.pop("data.train", None)
  workdir = tmp_path_factory.mktemp("runs") / "run"
  value = "('s3://b/x',)" if field == "data.choices" else "s3://b/x"
  said = refused(
    "glue",
    f"--config={ROOT}/configs/{config}.py",
    f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in chosen.items()),
    f"--config.{field}={value}",
  )
  assert "s3://b/x is no place" in said and "gs://BUCKET/NAME" in said


@pytest.mark.slow
def test_commands_read_from_a_store_and_write_to_it(
  random_adapter, bucket, tmp_path, typed, capsys, monkeypatch
):
  """The same is printed, and the same files are written, as on disk."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  local, remote = tmp_path / "local", f"{bucket}/commands"
  (local / "files").mkdir(parents=True)
  shutil.copytree(random_adapter(), local / "adapter")
  text = "sentence1\tsentence2\nword1 word2\tword3\nword4\tword5\n"
  (local / "files/texts.tsv").write_text(text)
  upload(local, place(remote))
  monkeypatch.chdir(tmp_path)
  printed = []
  for top in (local, remote):
    adapter = f"--adapter={top}/adapter"
    typed("predict", adapter, f"--input={top}/files/texts.tsv")
    typed("merge", adapter, f"--out={top}/merged")
    typed("predict", f"--model={top}/merged", f"--input={top}/files/texts.tsv")
    typed("peft", "export", adapter, f"--out={top}/peft")
    typed("peft", "import", f"--adapter={top}/peft", f"--out={top}/ours")
    printed.append(capsys.readouterr().out.replace(str(top), "TOP"))
  # rich breaks lines where a long path ends
  assert "".join(printed[0].split()) == "".join(printed[1].split())
  copy = local_copy(remote)
  assert list_files(copy) == list_files(local)
  for name in list_files(local):
    one, two = ((top / name).read_bytes() for top in (local, copy))
    if name.startswith("peft/adapter_model"):  # its metadata have no order
      one, two = (sorted(data) for data in (one, two))
    assert one == two, name
  assert {x.name for x in tmp_path.iterdir()} == {"home", "local"}


@pytest.mark.slow
def test_a_sweep_in_a_store_with_its_report(
  tiny_settings, bucket, typed, tmp_path, monkeypatch, capsys
):
  """Data, base and cache are in the store as well; scores are as on disk."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  top, tables = f"{bucket}/sweep", []
  named = {"model.name": "base", "data.source": "data"}
  for key, name in named.items():
    upload(Path(tiny_settings[key]), place(f"{top}/{name}"))
  remote = {key: f"{top}/{name}" for key, name in named.items()}
  remote["data.cache_dir"] = f"{top}/cache"
  for settings, workdir in (({}, tmp_path / "runs"), (remote, f"{top}/runs")):
    changed = {**tiny_settings, "optim.epochs": 1, "seed": 0, **settings}
    words = [f"--config.base.{k}={v}" for k, v in changed.items()]
    words += [f"--workdir={workdir}", "--config.base.task=rte"]
    config = "--config=tests/faults/sweep.py:1"
    done = subprocess.run(
      [sys.executable, "-m", "experiments.sweep", config, *words],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    typed("report", workdir, "--format=csv")
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    tables.append(table.drop(columns=[x for x in table if "sec" in x]))
  pd.testing.assert_frame_equal(*tables)
  files = list_files(place(f"{top}/runs"))
  assert {"report/table.md", "sweep.json"} <= {*files}
  assert any(x.startswith("logs/") for x in files)
  assert list_files(place(f"{top}/cache"))
  assert {x.name for x in tmp_path.iterdir()} == {"home", "runs"}
