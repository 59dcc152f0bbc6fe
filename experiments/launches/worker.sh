#!/usr/bin/env bash
# What one host of a slice does for the script that experiments.launch wrote.
#
#   worker.sh start ATTEMPT WORDS   install; have systemd run the next line
#   worker.sh train ATTEMPT WORDS   python WORDS; log and exit code to ATTEMPT
#
# A service of systemd, since it outlives the connection (gcloud repeats a
# command whose connection broke, which would train twice), and since systemd
# sends SIGTERM when the machine is preempted.
set -uo pipefail
mode=$1 attempt=$2
shift 2
cd "$(dirname "$0")/../.." || exit

start() {
  if [ ! -e .venv/installed ]; then
    python3 -m pip install --user --quiet uv &&
      "$HOME/.local/bin/uv" venv --quiet --clear --python=3.12 .venv &&
      "$HOME/.local/bin/uv" pip install --quiet --python=.venv/bin/python \
        -r requirements.txt -r requirements-gcs.txt \
        -r requirements-images.txt -r requirements-tpu.txt &&
      touch .venv/installed || exit
  fi
  sudo systemctl reset-failed vera 2>/dev/null
  # stopped before the network is, so that the last save and log get out
  sudo systemd-run --unit=vera --uid="$(id -u)" --working-directory="$PWD" \
    --setenv=PATH="$PATH" --property=After=network-online.target \
    --property=TimeoutStopSec=120 \
    "$BASH" "$PWD/experiments/launches/worker.sh" train "$attempt" "$@"
}

train() {
  local log=$HOME/vera_jax.log code uploads variables
  trap : TERM # the command gets it too, and this shell waits for its end
  if [ -e "$HOME/vera_jax.env" ]; then
    mapfile -t variables < <(grep '^[A-Za-z_]' "$HOME/vera_jax.env")
    export "${variables[@]?}"
  fi
  while sleep 60; do
    gcloud storage cp "$log" "$attempt/log-$(hostname)"
  done &
  uploads=$!
  PYTHONUNBUFFERED=1 .venv/bin/python "$@" >"$log" 2>&1
  code=$?
  kill "$uploads"
  gcloud storage cp "$log" "$attempt/log-$(hostname)"
  echo "$code" | gcloud storage cp - "$attempt/exit-$(hostname)"
}

"$mode" "$@"
