#!/usr/bin/env bash
# @COMMAND@
# on @HOSTS@ node(s) with @ACCELERATOR@ GPU(s) each, by SLURM.
#
#   sbatch [--partition=... --account=... --time=...] @FILE@
#   squeue --name=@NAME@         its state; what it prints is in @NAME@.JOB.log
#   scancel --name=@NAME@        the runs save, and the job ends
#
# Two minutes before its time limit, and when it is preempted, the job saves,
# ends with exit code @AGAIN@ and joins the queue again. The first line goes on
# with what was cancelled.
#SBATCH --job-name=@NAME@
#SBATCH --output=@NAME@.%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=@HOSTS@
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=@ACCELERATOR@
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -uo pipefail

@VARIABLES@
cd "$CHECKOUT" || exit

if [ -n "$ENV_FILE" ]; then
  mapfile -t variables < <(grep '^[A-Za-z_]' "$ENV_FILE")
  export "${variables[@]?}"
fi
# One process has all GPUs of its node; jax would give it one.
JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((${ACCELERATOR##*:} - 1)))
export JAX_LOCAL_DEVICE_IDS

# A process that has saved and ended waits for the others; it must not be the
# reason to kill them.
srun --kill-on-bad-exit=0 "$PYTHON" "${WORDS[@]}"
code=$?
if [ "$code" = "$AGAIN" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
