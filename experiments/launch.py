"""Write the script that starts a command on TPUs or a cluster and repeats it.

  python -m experiments.launch --to=tpu-vm --command=train \\
    --topology=v5e:2x4 --bucket=gs://BUCKET --project=PROJECT --zone=ZONE \\
    --config=configs/rte.py --seeds=0,1,2,3,4
  python -m experiments.launch --to=xpk --cluster=CLUSTER ...     on GKE, by xpk
  python -m experiments.launch --to=slurm --command=train --topology=gpu:2x8 \\
    --config=configs/rte.py --workdir=/shared/rte

Prints the script; with --out=FOLDER it is a file there. Nothing is started and
nobody is asked, so that it works without an account. The script's first lines
say how to start, watch, stop and delete what it starts.

Flags that are not listed here are the command's own. Whatever stops the command
with a signal (a preempted machine, a time limit, maintenance), it saves, ends
with exit code 75 and is started again; 0 or another code is the end.
docs/tpu_pod.md tells it from the beginning.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.console import TRAIN
from vera_jax.errors import EXIT_CODE, UserError
from vera_jax.places import local_place, place

TEMPLATES = Path(__file__).with_name("launches")
CHECKOUT = TEMPLATES.parents[1]
INSTALLED = CHECKOUT.name == "_commands"  # below the package: no checkout
COMMANDS = "train", "sweep", *TRAIN
# Google's name of the chips, the image of their machines, and how much a chip
# counts in the name of a type: v5p-8 are four chips.
CHIPS = {
  "v4": ("v4", "tpu-ubuntu2204-base", 2),
  "v5e": ("v5litepod", "v2-alpha-tpuv5-lite", 1),
  "v5p": ("v5p", "v2-alpha-tpuv5", 2),
  "v6e": ("v6e", "v2-alpha-tpuv6e", 1),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
# The flags that each kind of script needs, and those that it can do without.
GOOGLES = ("bucket", "project", "zone")
NEEDED = {
  "tpu-vm": GOOGLES,
  "xpk": (*GOOGLES, "cluster"),
  "slurm": ("workdir",),
}
OPTIONAL = {"tpu-vm": ("spot",), "xpk": ("spot", "image"), "slurm": ()}

flags.DEFINE_enum("to", None, list(NEEDED), "Where the command is to run.")
flags.DEFINE_enum("command", None, COMMANDS, "It is vera-jax COMMAND.")
flags.DEFINE_bool(
  "spot", True, "Cheaper TPUs, which may be taken away; --nospot: on demand."
)
flags.DEFINE_string(
  "topology",
  None,
  "TPUs and their arrangement, v5e:2x4 (8 chips), v5e:4x4 (16); for SLURM"
  " gpu:2x8, two nodes with eight GPUs each, or their name, h100:2x8.",
)
flags.DEFINE_string("bucket", None, "gs://BUCKET[/FOLDER], for runs and logs.")
flags.DEFINE_string(
  "workdir", None, "The command's. Unset: BUCKET/runs/NAME; SLURM needs one."
)
flags.DEFINE_string("name", None, "Of slice or job. Unset: the config's.")
flags.DEFINE_string("project", None, "Google Cloud's project.")
flags.DEFINE_string("zone", None, "Where the TPUs are: us-west4-a, ...")
flags.DEFINE_string("cluster", None, "The cluster on GKE, for xpk.")
flags.DEFINE_string(
  "image",
  None,
  "For xpk, a container with this checkout and what it needs. Unset:"
  " python:3.12, to which xpk adds the checkout; pods install the rest.",
)
flags.DEFINE_string(
  "env_file", None, "Lines NAME=VALUE for the command: HF_TOKEN, WANDB_API_KEY."
)
flags.DEFINE_string("out", None, "A folder for the script. Unset: print it.")


# A job is a mapping of these, which the templates know in capitals, to what
# flags or tables say: name, words (python's arguments, from -m on), topology,
# accelerator (what Google or SLURM calls it: v5litepod-8, or h100:8), hosts,
# runtime (the image of a TPU's machines), env_file, bucket, and as flags say:
SAID = "topology", "spot", "project", "zone", "cluster", "image"


def main(passed: list[str]) -> None:
  if "--" in passed:
    passed.remove("--")
  to, out = flags.FLAGS.to, flags.FLAGS.out
  folder = local_place(out or "", "--out")
  job = described(passed)
  path = folder / f"{job['name']}.{to}.sh"
  if not out:
    print(script(job, to, path.name), end="")
    return
  folder.mkdir(parents=True, exist_ok=True)
  path.write_text(script(job, to, str(path)))
  head = takewhile(lambda line: line[:1] == "#", path.read_text().splitlines())
  print(path, *(line[2:] for line in head if line[:2] == "# "), sep="\n")


def script(job: Mapping[str, Any], to: str, file: str) -> str:
  """The template for `to`, filled in; its first lines call it `file`."""
  template = (TEMPLATES / f"{to}.sh").read_text()
  values = {name.upper(): value for name, value in job.items()}
  words = shlex.join(values.pop("WORDS"))
  values |= {"AGAIN": EXIT_CODE, "CHECKOUT": CHECKOUT}
  values["PYTHON"] = ".venv/bin/python"  # as `make` has it in a checkout
  if INSTALLED:
    values |= {"CHECKOUT": Path.cwd(), "PYTHON": sys.executable}
  values["SPOT"] = "--spot" if job["spot"] else ""
  values["CAPACITY"] = values["SPOT"] or "--on-demand"
  assigned = [
    f"{name}={shlex.quote(str(value))}"
    for name, value in values.items()
    if re.search(rf"\${{?{name}\b", template)
  ]
  # words mean nothing to the shell
  head = f"# shellcheck disable=SC2016,SC2054\nWORDS=({words})"
  values["VARIABLES"] = "\n".join([head, *assigned])
  values["COMMAND"] = f"python {words}".replace("\n", "\n# ")
  values["FILE"] = file
  # in comments and directives, and once: a value is no template
  return re.sub(r"@([A-Z]+)@", lambda name: str(values[name[1]]), template)


def described(passed: Sequence[str]) -> dict[str, Any]:
  """The job that the flags describe; `passed` are the command's own.

  Raises:
    UserError: they describe none, or one that can't run there.
  """
  values, to = flags.FLAGS, flags.FLAGS.to
  for flag in ("to", "command", "topology", *NEEDED.get(to, ())):
    if not values[flag].value:
      raise UserError(f"--{flag} is needed. --help says what it is.")
  for flag in (*NEEDED["xpk"], *OPTIONAL["xpk"]):
    if values[flag].present and flag not in NEEDED[to] + OPTIONAL[to]:
      raise UserError(f"--{flag} means nothing to {to}: leave it out.")
  if INSTALLED and to != "slurm":
    raise UserError(
      f"--to={to} sends a checkout to the machines, and this is an installed"
      " package: use `python -m vera_jax launch` in a clone of the repository."
    )
  bucket, workdir = (values.bucket or "").rstrip("/"), values.workdir
  if workdir and not workdir.startswith("gs://"):
    workdir = str(place(workdir))
  env_file = checked_env_file(values.env_file, to)
  pod = machines(values.topology, to)
  if values.command == "sweep" and to != "slurm" and pod["hosts"] > 1:
    raise UserError(
      f"--topology={values.topology}: a sweep trains on one machine, and these"
      f" are {pod['hosts']}. Start it on several slices of one machine each,"
      " with a --name of its own and the same --workdir; one ensemble"
      " (--command=train --seeds=0,1,2,...) trains on all chips of a slice."
    )
  name = default_name(passed)  # there has to be a config in any case
  name = values.name or name
  workdir = workdir or f"{bucket}/runs/{name}"
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
    raise UserError(
      f"--name={name}: Kubernetes and Google want a small letter first, then"
      " small letters, digits and -, at most 40 in all, and no - at the end."
    )
  if to != "slurm":
    if not re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]+(/[-_.\w/]+)?", bucket):
      raise UserError(f"--bucket={bucket}: give gs://BUCKET or a folder in it.")
    if not workdir.startswith(f"{bucket}/"):
      raise UserError(
        f"--workdir={workdir} is not in {bucket}: it would be lost with the"
        " machine."
      )
    for word in passed:
      file = word.partition("=")[2] if word.startswith("-") else word
      if file.startswith(("/", "~", "../")):
        raise UserError(
          f"{word}: the machines of {to} don't have this file. Copy it to the"
          f" bucket (gcloud storage cp -r {file} {bucket}/data) and name that."
        )
  words = "-m", "vera_jax", values.command, *passed, f"--workdir={workdir}"
  # the command itself says what is wrong with its flags: now, not on the pod
  check = [sys.executable, *words, "--only_check_args"]
  folder = None if INSTALLED else CHECKOUT
  done = subprocess.run(check, cwd=folder, capture_output=True, text=True)
  if done.returncode:
    raise UserError(f"{values.command}: {done.stderr.strip()}")
  said = {flag: values[flag].value or "" for flag in SAID}
  job = {"name": name, "words": words, "bucket": bucket, "env_file": env_file}
  return said | pod | job


def machines(topology: str, to: str) -> dict[str, Any]:
  """The accelerator, hosts and runtime of a job.

  Raises:
    UserError: the topology is not known, or not there.
  """
  kind, _, shape = topology.partition(":")
  if to == "slurm":
    parts = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if kind in CHIPS or not parts or not re.fullmatch(r"\w+", kind):
      raise UserError(
        f"--topology={topology}: for SLURM give gpu:NODESxGPUS, such as gpu:2x8"
        " for two nodes with eight GPUs each, or their name, h100:2x8."
      )
    gpus = parts[2] if kind == "gpu" else f"{kind}:{parts[2]}"
    return {"accelerator": gpus, "hosts": int(parts[1]), "runtime": ""}
  if kind not in CHIPS:
    raise UserError(
      f"--topology={topology}: there are TPUs {', '.join(CHIPS)}, as v5e:2x4."
    )
  flat = kind in ("v5e", "v6e")
  shapes: tuple[str, ...] = FLAT if flat else SOLID
  if to == "xpk" and kind == "v5e":
    shapes = shapes[2:]  # xpk has none of one host
  if shape not in shapes:
    raise UserError(
      f"--topology={topology}: for {to} {kind} comes as {', '.join(shapes)}."
    )
  name, runtime, count = CHIPS[kind]
  chips = math.prod(map(int, shape.split("x")))
  # a machine has four chips, but for one kind that has eight, beside xpk
  alone = flat and to == "tpu-vm" and chips <= 8
  hosts = 1 if alone else -(-chips // 4)
  accelerator = f"{name}-{chips * count}"
  return {"accelerator": accelerator, "hosts": hosts, "runtime": runtime}


def default_name(passed: Sequence[str]) -> str:
  """The config's: rte, or rank-minilm for configs/sweeps/rank.py:minilm."""
  configs = re.findall(r"--?config[= ]([^\s:]+)(:\S+)?", " ".join(passed))
  if not configs:
    raise UserError("Say which settings: --config=rte")
  file, variant = configs[-1]
  return (Path(file).stem + variant).replace(":", "-").replace("_", "-")


def checked_env_file(name: str | None, to: str) -> str:
  """The file's whole path, after a look at its lines; "" without one."""
  if not name:
    return ""
  path = local_place(name, "--env_file").absolute()
  if not path.is_file():
    raise UserError(f"--env_file: there is no file {path}.")
  value, besides = ".*", ""
  if to == "xpk":  # it puts a value between quotes, and escapes nothing
    value, besides = r'[^"\\]*', ', for xpk without " and \\'
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if not re.fullmatch(rf"[A-Za-z_]\w*={value}|\s*(#.*)?", line):
      raise UserError(f"{path}, line {number}: give NAME=VALUE{besides}.")
  return str(path)


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True, others=True)
