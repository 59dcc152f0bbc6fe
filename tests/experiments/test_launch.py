"""The scripts of experiments.launch: run in a cloud that is played, by xpk's
dry run, and against the schema of what xpk makes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.experiments import command
from tests.faults.fixtures import Launcher
from vera_jax.errors import UserError
from vera_jax.places import place
from vera_jax.train.preemption import EXIT_CODE

FAKE = Path(__file__).with_name("fake_cloud.py")
WORKER = command.ROOT / "experiments" / "launches" / "worker.sh"
CRD = command.ROOT / "tests" / "golden" / "jobset_crd.json"
PASSED = ["--config=configs/rte.py", "--seeds=0,1,2"]
RTE = ["--command=glue", *PASSED]
GOOGLE = ["--bucket=gs://b1/x", "--project=p1", "--zone=us-west4-a"]
TPU_VM = ["--to=tpu-vm", *GOOGLE, *RTE]
XPK = ["--to=xpk", *GOOGLE, *RTE, "--cluster=c1"]
SLURM = ["--to=slurm", *RTE, "--topology=h100:2x8", "--workdir=/shared/rte"]
V5E_8 = "--topology=v5e:2x4"
ON_GKE = ["v5e:2x4", "v5e:4x4", "v6e:4x8", "v5p:2x4x4", "v4:2x2x2"]


def tool(name):
  """A program on the PATH, or beside this Python."""
  beside = Path(sys.executable).parent
  return shutil.which(name) or shutil.which(name, path=beside)


# Writes many scripts in one process; the command as a whole is slower, since it
# asks another one whether its flags are right.
WRITE = """
import json, sys
from pathlib import Path
from experiments import launch
launch.CHECKOUT = Path(sys.argv.pop(1))
for to, topology, fields, file in json.load(sys.stdin):
  job = launch.machines(topology, to) | {
    "name": "rte", "env_file": "", "spot": True, "bucket": "gs://b1/x",
    "project": "p1", "zone": "us-west4-a", "cluster": "c1", "image": "",
    "topology": topology, "words": ["-m", "experiments.glue", *sys.argv[1:]],
  } | fields
  with open(file, "w") as out:
    out.write(launch.script(job, to, file))
"""
WORDS = [*RTE[1:], "--config.data.source=a'b $(touch x)"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
  """A file for each (to, topology)."""
  folder = tmp_path_factory.mktemp("scripts")
  checkout = folder / "checkout"  # of a size that is packed at once
  worker = checkout / WORKER.relative_to(command.ROOT)
  worker.parent.mkdir(parents=True)
  shutil.copy(WORKER, worker)
  subprocess.run(["git", "init", "--quiet", checkout], check=True)
  secrets = folder / "secrets"
  secrets.write_text("# of mine\nSECRET=a b$c\n")
  jobs = {
    (to, topology): (to, topology, fields, f"{folder}/{to}-{topology}.sh")
    for to, topology, fields in [
      ("tpu-vm", "v5e:2x4", {}),
      ("tpu-vm", "v4:2x2x2", {"env_file": str(secrets)}),
      ("tpu-vm", "v6e:2x2", {"spot": False}),
      ("slurm", "h100:2x8", {}),
      *(("xpk", topology, {"env_file": str(secrets)}) for topology in ON_GKE),
    ]
  }
  subprocess.run(
    [sys.executable, "-c", WRITE, str(checkout), *WORDS],
    cwd=command.ROOT,
    input=json.dumps(list(jobs.values())),
    text=True,
    check=True,
  )
  return {key: Path(file) for key, (*_, file) in jobs.items()}


@pytest.fixture
def cloud(tmp_path):
  """Programs of a cloud's names on the PATH; returns a function that runs a
  script among them."""
  root = tmp_path / "cloud"
  (root / "bin").mkdir(parents=True)
  names = "gcloud sudo systemctl systemd-run uv hostname python3 srun scontrol"
  for name in names.split():
    program = root / "bin" / name
    program.write_text(
      f'#!/bin/sh\nexec {sys.executable} -ISB {FAKE} {name} "$@"\n'
    )
    program.chmod(0o755)

  def run(file, *words, plan="", hosts=1, timeout=600, **environment):
    if plan:
      (root / "plan").write_text(plan)
    done = subprocess.run(
      ["bash", str(file), *words],
      env={
        **os.environ,
        "PATH": f"{root}/bin:{os.environ['PATH']}",
        "CLOUD": str(root),
        "HOSTS": str(hosts),
        "POLL": "0.05",
        "GRACE": "0.05",
        **environment,
      },
      capture_output=True,
      text=True,
      timeout=timeout,
    )
    calls = (root / "calls").read_text().splitlines()
    return done, calls

  run.root = root
  return run


def attempts(cloud):
  return sorted((cloud.root / "bucket/b1/x/launches/rte").glob("2*"))


def count(calls, words):
  return sum(words in call for call in calls)


@pytest.mark.parametrize(
  "plan, code, trained",
  [
    pytest.param("0", 0, 1, marks=pytest.mark.slow),
    (f"{EXIT_CODE} 0", 0, 2),
    pytest.param("1", 1, 1, marks=pytest.mark.slow),
  ],
)
def test_only_what_was_stopped_and_saved_is_repeated(
  plan, code, trained, cloud, scripts
):
  done, calls = cloud(scripts["tpu-vm", "v5e:2x4"], plan=plan)
  assert done.returncode == code, done.stderr
  assert count(calls, "sudo systemd-run") == trained
  # one slice for all attempts, and at the end none that costs
  assert count(calls, "queued-resources create") == 1
  assert not (cloud.root / "slice").exists()
  commands = (cloud.root / "commands").read_text().splitlines()
  assert commands == [" ".join(["-m experiments.glue", *WORDS])] * trained
  logs = [a / "log-host-0" for a in attempts(cloud)]
  assert [log.read_text() for log in logs] == ["trains, SECRET=\n"] * trained


@pytest.mark.slow
def test_a_slice_that_is_taken_away_is_asked_for_again(cloud, scripts):
  file = scripts["tpu-vm", "v4:2x2x2"]
  done, calls = cloud(file, plan="preempt 0", hosts=2)
  assert done.returncode == 0, done.stderr
  assert count(calls, "queued-resources create") == 2
  assert count(calls, "--accelerator-type=v4-16") == 2
  assert count(calls, "--spot") == 2
  assert not (cloud.root / "slice").exists()
  logs = [log.read_text() for log in attempts(cloud)[-1].glob("log-*")]
  assert logs == ["trains, SECRET=a b$c\n"] * 2
  # a secret is on the machines alone
  assert "SECRET" not in file.read_text()
  assert not [c for c in calls if "gcloud storage" in c and "secrets" in c]


@pytest.mark.slow
def test_an_error_beside_a_preemption_is_a_preemption(cloud, scripts):
  """Hosts whose neighbour is gone end with an error before the slice does."""
  file = scripts["tpu-vm", "v5e:2x4"]
  done, calls = cloud(file, plan="1preempt 0")
  assert done.returncode == 0, done.stderr
  assert count(calls, "queued-resources create") == 2


@pytest.mark.slow
def test_a_real_run_goes_on_on_another_slice(cloud, bucket, tmp_path):
  """The sent code, trained with its saves in a store, to the same bits."""
  launcher = Launcher(tmp_path, epochs=6)
  words = ["--config=configs/quickstart.py"]
  words += [f"--config.{k}={v}" for k, v in launcher.settings.items()]
  workdir = f"{bucket}/launched/runs/quickstart"
  file = tmp_path / "quickstart.sh"
  fields = {"name": "quickstart", "words": ["-m", "experiments.glue", *words]}
  fields["words"].append(f"--workdir={workdir}")
  subprocess.run(
    [sys.executable, "-c", WRITE, str(command.ROOT)],
    cwd=command.ROOT,
    input=json.dumps([("tpu-vm", "v5e:2x4", fields, str(file))]),
    text=True,
    check=True,
  )
  done, calls = cloud(
    file, plan="preempt 0", timeout=1800, REAL=sys.executable, POLL="0.5"
  )
  logs = [log.read_text() for log in cloud.root.glob("bucket/**/log-host-0")]
  assert done.returncode == 0, f"{done.stderr}\n{logs}"
  assert count(calls, "queued-resources create") == 2
  assert "Stopped by SIGTERM" in "".join(logs)
  alone = tmp_path / "alone"
  glue = [sys.executable, "-m", "experiments.glue", *words]
  subprocess.run([*glue, f"--workdir={alone}"], cwd=command.ROOT, check=True)
  adapter = "adapter/adapter.safetensors"
  bits = (place(workdir) / adapter).read_bytes()
  assert bits == (alone / adapter).read_bytes()


def test_a_slice_that_there_can_not_be_is_asked_for_once(cloud, scripts):
  file = scripts["tpu-vm", "v6e:2x2"]
  done, calls = cloud(file, plan="0", FIRST_STATE="FAILED")
  assert done.returncode == 1
  assert f"{file} delete" in done.stderr
  assert count(calls, "create") == 1 and not count(calls, "--spot")


def test_stop_saves_and_deletes(cloud, scripts):
  root = cloud.root
  (root / "slice").write_text("ACTIVE")
  (root / "homes" / "0").mkdir(parents=True)
  (root / "plan").touch()
  done, calls = cloud(scripts["tpu-vm", "v5e:2x4"], "stop")
  assert done.returncode == 0, done.stderr
  stops = [i for i, call in enumerate(calls) if "systemctl stop vera" in call]
  deletes = [i for i, c in enumerate(calls) if "queued-resources delete" in c]
  assert stops and deletes and max(stops) < min(deletes)
  assert not (root / "slice").exists()
  assert (root / "bucket/b1/x/launches/rte/stop").exists()  # `run` ends by it


@pytest.mark.parametrize("code, again", [(0, 0), (EXIT_CODE, 1), (1, 0)])
def test_slurm_puts_a_stopped_job_into_the_queue(code, again, cloud, scripts):
  file = scripts["slurm", "h100:2x8"]
  text = file.read_text()
  for directive in ("nodes=2", "gpus-per-node=h100:8", "signal=TERM@120"):
    assert f"#SBATCH --{directive}\n" in text
  assert "#SBATCH --requeue\n" in text
  done, calls = cloud(file, CODE=str(code), SLURM_JOB_ID="7")
  assert done.returncode == code, done.stderr
  assert count(calls, "scontrol requeue 7") == again
  (call,) = [call for call in calls if call.startswith("srun")]
  assert call.endswith(" ".join(["-m experiments.glue", *WORDS]))


def test_shells_read_the_scripts(scripts):
  for file in scripts.values():
    subprocess.run(["bash", "-n", file], check=True)
  if shellcheck := tool("shellcheck"):
    subprocess.run([shellcheck, *scripts.values(), WORKER], check=True)


needs_xpk = pytest.mark.skipif(not tool("xpk"), reason="needs xpk")


def manifest(file, folder):
  """What xpk would give Kubernetes."""
  out = folder / "manifest.yaml"
  subprocess.run(
    ["bash", file, "--dry-run", "--skip-validation"]
    + [f"--output-manifest-file={out}"],
    check=True,
    capture_output=True,
  )
  return yaml.safe_load(out.read_text())


def without_nulls(tree):
  """Kubernetes drops them before it looks at a manifest."""
  if isinstance(tree, dict):
    return {k: without_nulls(v) for k, v in tree.items() if v is not None}
  if isinstance(tree, list):
    return [without_nulls(value) for value in tree]
  return tree


def answer(jobset, code):
  """What a JobSet does when a process ends with this code."""
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["backoffLimit"] == 0  # the first failure is the job's
  (rule,) = job["podFailurePolicy"]["rules"]
  codes = rule["onExitCodes"]
  matches = (code in codes["values"]) == (codes["operator"] == "In")
  reason = "PodFailurePolicy" if matches else "BackoffLimitExceeded"
  for rule in jobset["spec"]["failurePolicy"]["rules"]:
    if reason in rule["onJobFailureReasons"]:
      return rule["action"]
  return (
    "RestartJobSet" if jobset["spec"]["failurePolicy"]["maxRestarts"] else ""
  )


@needs_xpk
@pytest.mark.parametrize("topology", ON_GKE)
def test_xpk_makes_a_jobset_that_restarts_after_our_code(
  topology, scripts, tmp_path
):
  jobset = without_nulls(manifest(scripts["xpk", topology], tmp_path))
  assert answer(jobset, EXIT_CODE) == "RestartJobSet"
  assert answer(jobset, 143) == "RestartJobSet"  # killed with its node
  assert answer(jobset, 1) == answer(jobset, 2) == "FailJobSet"
  pods = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = pods["template"]["spec"]
  arrangement = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  assert arrangement == topology.partition(":")[2]
  (container,) = pod["containers"]
  assert "&& exec python -m experiments.glue" in container["command"][-1]
  assert {"name": "SECRET", "value": "a b$c"} in container["env"]
  # what JobSet's webhook adds before the schema is applied
  for number, rule in enumerate(jobset["spec"]["failurePolicy"]["rules"]):
    rule.setdefault("name", f"failurePolicyRule{number}")
  (version,) = json.loads(CRD.read_text())["spec"]["versions"]
  schema = version["schema"]["openAPIV3Schema"]
  assert jobset["apiVersion"] == f"jobset.x-k8s.io/{version['name']}"
  jsonschema.Draft7Validator(closed(schema)).validate(jobset)


def closed(schema):
  """The schema, for which a field that it doesn't have is an error."""
  if isinstance(schema, list):
    return [closed(value) for value in schema]
  if not isinstance(schema, dict):
    return schema
  schema = {key: closed(value) for key, value in schema.items()}
  if isinstance(schema.get("properties"), dict):
    schema.setdefault("additionalProperties", False)
  if schema.get("x-kubernetes-int-or-string"):
    schema["type"] = ["integer", "string"]
  return schema


MISTAKES = [
  (["--to=tpu-vm", *RTE, V5E_8], "--bucket is needed"),
  ([*TPU_VM], "--topology is needed"),
  ([*TPU_VM, "--topology=v5e:3x3"], "v5e comes as 1x1, 2x2, 2x4"),
  ([*TPU_VM, "--topology=v9:2x4"], "there are TPUs v4, v5e"),
  ([*XPK, "--topology=v5e:2x2"], "for xpk v5e comes as 2x4"),
  ([*TPU_VM, V5E_8, "--cluster=c1"], "--cluster means nothing to tpu-vm"),
  ([*SLURM, "--spot"], "--spot means nothing to slurm"),
  ([*SLURM, V5E_8], "for SLURM give gpu:NODESxGPUS"),
  ([*TPU_VM, "--topology=v5e:4x4", "--command=sweep"], "on one machine"),
  ([*TPU_VM, V5E_8, "--name=My_Run"], "small letters, digits and -"),
  ([*TPU_VM, V5E_8, "--name=" + "a" * 41], "at most 40"),
  ([*TPU_VM, V5E_8, "--workdir=runs/rte"], "not in gs://b1/x"),
  ([*TPU_VM, V5E_8, "--bucket=s3://b1"], "give gs://BUCKET"),
  ([*TPU_VM, V5E_8, "--", "--config.data.source=/d"], "don't have this file"),
  ([*TPU_VM, V5E_8, "--env_file=nowhere"], "there is no file"),
]


@pytest.mark.parametrize("words, said", MISTAKES)
def test_what_can_not_be_launched_is_said_before_it_costs(words, said, typed):
  mine = [w for w in words if w not in PASSED]
  with pytest.raises(UserError, match=re.escape(said)):
    typed("launch", *mine, "--", *PASSED)


def test_the_command_writes_a_file_and_says_how_to_use_it(tmp_path):
  """The flags that are not its own are the command's, in their order."""
  flags = [*TPU_VM, V5E_8, f"--out={tmp_path}", "--", "--noconfig.predict_test"]
  done, refused, unknown = command.run_each(
    ["experiments.launch", *flags],
    ["experiments.launch", *TPU_VM, V5E_8, "--topologi=v5e:4x4"],
    ["experiments.launch", *TPU_VM, V5E_8, "--config.method=lorra"],
  )
  assert "method is 'lorra'" in unknown.stderr and unknown.returncode == 1
  assert refused.returncode == 1  # by the command, whose flag it is not either
  assert "Unknown command line flag 'topologi'" in refused.stderr
  assert done.returncode == 0, done.stderr
  file = tmp_path / "rte.tpu-vm.sh"
  for words in ("", " watch", " stop", " delete"):
    assert f"bash {file}{words} " in done.stdout
  words = f"{RTE[1]} {RTE[2]} --noconfig.predict_test"
  command_line = f"(-m vera_jax glue {words} --workdir=gs://b1/x/runs/rte)"
  assert f"\nWORDS={command_line}\n" in file.read_text()
