"""Plays gcloud, systemd, uv, srun and scontrol for the scripts of a launch.

Programs of these names in $CLOUD/bin call this one. What there is lies there:
`bucket/` for gs://, `slice` with the state of the queued resource, `homes/N`
for the hosts, `calls` with a line per call. `plan` has the exit code of each
attempt to come, or "preempt": then the slice is taken away while it runs, or
"1preempt": just after it has ended with 1. With $REAL, a Python, the hosts run
the command itself, and a slice is taken away once there is a save in the store.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
SLICE, PLAN, HOMES = CLOUD / "slice", CLOUD / "plan", CLOUD / "homes"
# What `python` is on a host: it ends as planned, or when it is told to.
COMMAND = """#!/usr/bin/env bash
echo "$@" >>"$CLOUD/commands"
code=$(cat "$HOME/code")
[ "$code" != 1preempt ] || exit 1
echo "trains, SECRET=${SECRET:-}"
if [ "$code" = preempt ]; then
  trap 'echo saved; exit 75' TERM
  while true; do sleep 0.05; done
fi
exit "$code"
"""


def option(words: list[str], name: str) -> str:
  return next(w for w in words if w.startswith(name)).partition("=")[2]


def local(url: str) -> Path:
  return CLOUD / "bucket" / url.removeprefix("gs://")


def stop(home: Path) -> None:
  """SIGTERM to what runs on a host, and wait for its end."""
  if not (home / "service").exists():
    return
  pid = int((home / "service").read_text())
  (home / "service").unlink()
  with suppress(ProcessLookupError):
    os.killpg(pid, signal.SIGTERM)
    while True:
      os.killpg(pid, 0)
      time.sleep(0.05)


def stop_all() -> None:
  for home in HOMES.iterdir():
    stop(home)


def is_saved() -> bool:
  """Whether a real command has saved; one that is played needs no save."""
  if "REAL" not in os.environ:
    return True
  objects = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o"
  with urllib.request.urlopen(objects) as answer:
    names = [item["name"] for item in json.load(answer).get("items", [])]
  return any("/checkpoints/1" in name for name in names)


def queued_resources(verb: str, words: list[str]) -> int:
  state = SLICE.read_text() if SLICE.exists() else ""
  if verb == "create":
    SLICE.write_text(os.environ.get("FIRST_STATE", "PROVISIONING"))
    for number in range(int(os.environ["HOSTS"])):
      (HOMES / str(number)).mkdir(parents=True)
  elif verb == "list":
    codes = {file.read_text() for file in HOMES.glob("*/code")}
    ended = list((CLOUD / "bucket").glob("**/exit-*"))
    if codes == {"preempt"} and is_saved() or codes == {"1preempt"} and ended:
      stop_all()
      state = "SUSPENDED"
    print(state, end="")
    if state:
      SLICE.write_text("ACTIVE" if state == "PROVISIONING" else state)
  elif verb == "delete":
    stop_all()
    shutil.rmtree(HOMES)
    SLICE.unlink()
  return 0


def on_hosts(act: str, words: list[str]) -> int:
  if not SLICE.exists() or SLICE.read_text() != "ACTIVE":
    return 1
  if act == "scp":
    for home in HOMES.iterdir():
      shutil.copy(words[0], home / words[1].partition(":")[2])
    return 0
  codes = PLAN.read_text().split()
  if "worker.sh start" in option(words, "--command"):
    PLAN.write_text(" ".join(codes[1:]))
    for home in HOMES.iterdir():
      (home / "code").write_text(codes[0])
  hosts = [
    subprocess.Popen(
      ["bash", "-c", option(words, "--command")],
      cwd=home,
      env={**os.environ, "HOME": str(home)},
    )
    for home in HOMES.iterdir()
  ]
  return max([host.wait() for host in hosts])


def storage(verb: str, words: list[str]) -> int:
  files = [w for w in words if not w.startswith("--")]
  if verb == "cp":
    source, target = files
    local(target).parent.mkdir(parents=True, exist_ok=True)
    data = sys.stdin.buffer if source == "-" else open(source, "rb")
    local(target).write_bytes(data.read())
    return 0
  root = CLOUD / "bucket"
  matches = sorted(root.glob(files[0].removeprefix("gs://")))
  for match in matches:
    if verb == "cat":
      sys.stdout.buffer.write(match.read_bytes())
    elif verb == "ls":
      print(f"gs://{match.relative_to(root)}")
    else:
      match.unlink()
  return 0 if matches else 1


def systemd_run(words: list[str]) -> int:
  first = next(i for i, word in enumerate(words) if not word.startswith("--"))
  home = Path(os.environ["HOME"])
  # a service outlives the connection that started it
  service = subprocess.Popen(
    words[first:],
    cwd=option(words, "--working-directory"),
    start_new_session=True,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env={**os.environ, "PATH": option(words, "--setenv=PATH")[5:]},
  )
  (home / "service").write_text(str(service.pid))
  return 0


def main(name: str, words: list[str]) -> int:
  with open(CLOUD / "calls", "a") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.write(" ".join([name, *words]).replace("\n", " ") + "\n")
  if name == "gcloud":
    match words:
      case ["compute", "tpus", "queued-resources", verb, *rest]:
        return queued_resources(verb, rest)
      case ["compute", "tpus", "tpu-vm", act, _, *rest] if act == "ssh":
        return on_hosts(act, rest)
      case ["compute", "tpus", "tpu-vm", act, *rest]:
        return on_hosts(act, rest)
      case ["storage", verb, *rest]:
        return storage(verb, rest)
  if name == "sudo":
    return subprocess.call(words)
  if name == "systemd-run":
    return systemd_run(words)
  if name == "systemctl":
    if words[0] == "stop":
      stop(Path(os.environ["HOME"]))
  if name == "uv" and words[0] == "venv":
    python = Path(words[-1], "bin", "python")
    python.parent.mkdir(parents=True)
    real = f'#!/bin/sh\nexec {os.environ.get("REAL")} "$@"\n'
    python.write_text(real if "REAL" in os.environ else COMMAND)
    python.chmod(0o755)
  if name == "hostname":
    print(f"host-{Path(os.environ['HOME']).name}")
  if name == "python3":  # pip install uv
    uv = Path(os.environ["HOME"], ".local/bin/uv")
    uv.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(CLOUD / "bin" / "uv", uv)
  if name == "srun":
    return int(os.environ["CODE"])
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1], sys.argv[2:]))
