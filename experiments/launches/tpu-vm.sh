#!/usr/bin/env bash
# @COMMAND@
# on a slice of @ACCELERATOR@ (@TOPOLOGY@), by gcloud.
#
#   bash @FILE@          ask for the slice, wait, train; after a preemption ask
#                      for another and go on; delete the slice at the end
#   bash @FILE@ watch    the slice's state, the last lines of each host's log
#   bash @FILE@ stop     the runs save, then the slice is deleted
#   bash @FILE@ delete   delete the slice as it is; then only the bucket costs
#
# The first one has to stay alive (in tmux, or on a small machine): it only
# looks after the slice, which trains, and costs, without it. Run again, it goes
# on. KEEP=1 before it keeps the slice at the end. Logs and exit codes are in
# @BUCKET@/launches/@NAME@
set -uo pipefail

@VARIABLES@
FILES=$BUCKET/launches/$NAME # the code that is sent, logs, exit codes
POLL=${POLL:-30}             # seconds between two looks
GRACE=${GRACE:-60}           # seconds from the first host's end to the last's

say() { echo "$(date -u +%H:%M:%S) $*" >&2; }
tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }
on_workers() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }

state() { # of the queued resource; nothing where there is none
  until tpus queued-resources list --filter="name~/$NAME\$" \
    --format="value(state.state)"; do
    sleep "$POLL" # no answer is not the answer that there is none
  done
}

delete() {
  say "deleting $NAME"
  until [ -z "$(state)" ]; do
    tpus queued-resources delete "$NAME" --force # fails while it is underway
    sleep "$POLL"
  done
}

send_code() { # as it lies here, without what git ignores
  git -C "$CHECKOUT" ls-files -z --cached --others --exclude-standard |
    tar --create --gzip --null --directory="$CHECKOUT" --files-from=- |
    gcloud storage cp - "$FILES/code.tar.gz"
}

start() { # one attempt, on all hosts
  if [ -n "$ENV_FILE" ]; then # not by the bucket: it may hold secrets
    tpus tpu-vm scp "$ENV_FILE" "$NAME:vera_jax.env" --worker=all || return
  fi
  say "starting on $HOSTS host(s); logs: $1"
  on_workers "sudo systemctl stop vera 2>/dev/null; mkdir -p vera_jax &&
    gcloud storage cat '$FILES/code.tar.gz' | tar xz --directory=vera_jax &&
    bash vera_jax/experiments/launches/worker.sh start '$1' $(
    printf '%q ' "${WORDS[@]}"
  )"
}

run() { # one look after another, until an attempt has come to its end
  local now attempt="" before="" code codes
  trap 'say "$NAME may still be there, and cost: bash $0 delete"' EXIT
  gcloud storage rm "$FILES/stop" >/dev/null 2>&1
  send_code || exit 1
  while true; do
    if gcloud storage ls "$FILES/stop" >/dev/null 2>&1; then
      say "stopped by \`$0 stop\` or \`delete\`"
      exit "$AGAIN"
    fi
    now=$(state)
    [ "$now" = "$before" ] || say "the slice: ${now:-none}"
    [ "$now" = ACTIVE ] || attempt=
    before=$now
    case $now in
    "")
      say "asking for $ACCELERATOR"
      tpus queued-resources create "$NAME" --node-id="$NAME" --async \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
        ${SPOT:+--spot} || exit 1
      ;;
    SUSPENDING | SUSPENDED) delete ;; # preempted, and never given back
    FAILED)
      tpus queued-resources describe "$NAME"
      exit 1
      ;;
    ACTIVE)
      if [ -z "$attempt" ]; then
        attempt=$FILES/$(date -u +%Y%m%d-%H%M%S)
        start "$attempt"
        code=$?
        # it may have been preempted while it was installing
        [ "$code" = 0 ] || { sleep "$POLL" && [ "$(state)" != ACTIVE ]; } ||
          break
      elif gcloud storage ls "$attempt/exit-*" >/dev/null 2>&1 &&
        # within a minute a lost host's neighbours have ended too, and a slice
        # that was taken away is no longer active
        sleep "$GRACE" && [ "$(state)" = ACTIVE ]; then
        codes=$(gcloud storage cat "$attempt/exit-*")
        code=$(grep -vxE "0|$AGAIN" <<<"$codes" || sort -rn <<<"$codes")
        code=${code%%$'\n'*} # an error before 75, 75 before 0
        [ "$code" = "$AGAIN" ] || break
        attempt=
      fi
      ;;
    esac
    sleep "$POLL"
  done
  say "ended with $code"
  if [ -z "${KEEP:-}" ]; then
    delete
    trap - EXIT
  fi
  exit "$code"
}

watch() {
  echo "$NAME: $(state)"
  for log in $(gcloud storage ls "$FILES/*/log-*" | tail -n "$HOSTS"); do
    echo "== $log"
    gcloud storage cat "$log" | tail -n 5
  done
}

case ${1:-run} in
run) run ;;
watch) watch ;;
stop | delete)
  echo "$1" | gcloud storage cp - "$FILES/stop" # for `run`, wherever it is
  [ "$1" = delete ] || on_workers "sudo systemctl stop vera"
  delete
  ;;
*)
  echo "$0 [run|watch|stop|delete]" >&2
  exit 2
  ;;
esac
