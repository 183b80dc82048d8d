#!/bin/bash
# Inside srun: says to a task where it stands in the job, then becomes the command that follows.
#   ALSACE_LAUNCHER=torchrun   one task per node; alsace starts the node's ranks itself, as torchrun does
#   ALSACE_LAUNCHER=srun       one task per rank
#   ALSACE_LAUNCHER=none       one task that needs no others
set -euo pipefail

# The rendezvous: the job's first node, and a port of the job's own below the ephemeral range (32768 and up).
if [[ -z ${MASTER_ADDR:-} ]]; then
  if command -v scontrol >/dev/null; then
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${nodes%%$'\n'*}
  else # in a container: srun was started on the first node
    MASTER_ADDR=$SLURM_LAUNCH_NODE_IPADDR
  fi
fi
# Arithmetic would run what stands in brackets in a variable: only digits come to it.
[[ $SLURM_JOB_ID =~ ^[0-9]+$ ]] || { echo "error: SLURM_JOB_ID is not a number" >&2; exit 2; }
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"

# What ranks other than 0 print and the cause of a failure go there, and by it alsace knows that this is a job: in one
# of `alsace submit` it is given, in an allocation of a person's it lies where srun was called.
if [[ -z ${ALSACE_ATTEMPT_DIR:-} ]]; then
  export ALSACE_ATTEMPT_DIR="$PWD/slurm-$SLURM_JOB_ID"
  mkdir -p -- "$ALSACE_ATTEMPT_DIR"
fi

# Threads of a rank (engine.num_threads has the last word), and scratch space on the node itself.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TMPDIR="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"
[[ -d $TMPDIR && -w $TMPDIR ]] || TMPDIR=/tmp # the submitter's may not be there

case ${ALSACE_LAUNCHER:-torchrun} in
  torchrun) export ALSACE_NUM_NODES="$SLURM_STEP_NUM_NODES" ALSACE_NODE_RANK="$SLURM_NODEID" ;;
  srun) export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_STEP_NUM_TASKS" LOCAL_RANK="$SLURM_LOCALID" ;;
esac
exec "$@"
