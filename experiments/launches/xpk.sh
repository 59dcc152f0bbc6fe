#!/usr/bin/env bash
# @COMMAND@
# on a slice of @ACCELERATOR@ (@TOPOLOGY@) of a GKE cluster, by xpk.
#
#   bash @FILE@          start it; more flags of xpk may follow, as --dry-run
#   bash @FILE@ watch    the workload's state, and what the first host prints
#   bash @FILE@ stop     the runs save, the workload is deleted; its nodes, and so
#                      the costs, stay until the cluster is deleted or shrinks
#
# There has to be a cluster with such a slice:
#   xpk cluster create --cluster=@CLUSTER@ --project=@PROJECT@ --zone=@ZONE@ \
#     --tpu-type=@ACCELERATOR@ --num-slices=1 @CAPACITY@
#   xpk cluster delete --cluster=@CLUSTER@ --project=@PROJECT@ --zone=@ZONE@
#
# Exit code @AGAIN@ starts the workload again, as a preempted node does; any
# other but 0 ends it.
set -euo pipefail

@VARIABLES@
on=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
case ${1:-} in
watch)
  xpk workload list "${on[@]}"
  kubectl logs --follow --selector="xpk.google.com/workload=$NAME,batch.kubernetes.io/job-completion-index=0"
  exit
  ;;
stop)
  xpk workload delete --workload="$NAME" "${on[@]}"
  exit
  ;;
esac

# exec: xpk sends SIGTERM to its child, which would be a shell
command="exec python $(printf '%q ' "${WORDS[@]}")"
if [ -n "$IMAGE" ]; then
  container=(--docker-image="$IMAGE")
else
  container=(--base-docker-image=python:3.12 --script-dir="$CHECKOUT")
  command="pip install --quiet -r requirements.txt -r requirements-gcs.txt \
    -r requirements-images.txt -r requirements-tpu.txt && $command"
fi
# without --max-restarts nothing is started again
xpk workload create --workload="$NAME" "${on[@]}" --tpu-type="$ACCELERATOR" \
  --num-slices=1 "$CAPACITY" --restart-on-exit-codes="$AGAIN" \
  --max-restarts=1000 --termination-grace-period-seconds=120 \
  ${ENV_FILE:+--env-file="$ENV_FILE"} "${container[@]}" \
  --command="$command" "$@"
