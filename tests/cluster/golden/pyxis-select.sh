#!/bin/bash -l
# alsace_dist: select round 1
# Written by `alsace submit`, which also chains it to the others; `sbatch` takes it as it is.
#SBATCH --job-name='xxl: select round 1'
#SBATCH --output=/shared/runs/xxl/slurm/logs/04-select-round-1.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@300
#SBATCH --time=04:00:00
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2

# shellcheck disable=SC1003,SC1091,SC2016  # values are quoted so that nothing in them counts

refuse() {
  echo "error: $1" >&2
  exit 2
}

# A stop signal, whenever it comes, goes on to the step, whose ranks agree on a point to stop at.
step='' told=''
forward() {
  told=1
  [[ -z $step ]] || kill -USR2 "$step" 2>/dev/null
}
trap forward USR1 USR2

# --- The site: software and environment, as its profile says ---
unset "${!ALSACE_@}" MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK # of whoever has submitted this
export NCCL_DEBUG=WARN

# --- The run ---
set -uo pipefail
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}
max_requeues=20
((restarts <= max_requeues)) || refuse "requeued $restarts times; submit again to go on"
cd -- / || refuse "no working directory"
# What the ranks leave of this start of the job: their output, and the cause if they fail.
export ALSACE_ATTEMPT_DIR=/shared/runs/xxl/slurm/attempts/$job/$restarts
mkdir -p -- "$ALSACE_ATTEMPT_DIR" || refuse "cannot write into the run directory"
export ALSACE_LAUNCHER=none ALSACE_RANKS_PER_NODE=1
export ALSACE_LEAD_SECONDS=300 ALSACE_GPUS_PER_NODE=8
echo "== $SLURM_JOB_NAME: job $job, restart $restarts, $SLURM_JOB_NODELIST, $(date '+%F %T')"

# --- The step ---
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --container-image=/shared/images/alsace_dist.sqsh --container-mounts=/shared:/shared --container-workdir=/ \
  bash /shared/runs/xxl/slurm/slurm_task.sh \
  python -m alsace_dist select /shared/runs/xxl/config.yaml --round=1 &
step=$!
[[ -z $told ]] || forward
# A signal ends `wait`, not the step.
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  status=$?
done
((status <= 128)) || { wait "$step"; status=$?; } # it ended while a signal was taken
((status == 0)) && exit 0

# --- The step has failed or was stopped: why, and does it go on? ---
# Causes are named cause-<0: own, 1: another rank failed>-<time>-<exit code>-<who>: the first one is the one to read.
cause=$(find "$ALSACE_ATTEMPT_DIR" -maxdepth 1 -name 'cause-*' | sort | head -n 1)
code=$status message="the step ended with exit code $status; the lines above say why"
((status != 137)) || message="the step was killed (often: out of memory); the lines above say more"
if [[ -n $cause ]]; then
  message=$(<"$cause")
  code=$(cut -d- -f4 <<<"${cause##*/}")
fi
# Where the next start goes on, if this one failed: three failures in a row that leave it at the same point are enough.
position=$(cat "$ALSACE_ATTEMPT_DIR/position" 2>/dev/null)
if ((code != 75)) || [[ -z $position ]]; then
  echo "$position" >"$ALSACE_ATTEMPT_DIR/failed-at" || code=2 # the disk is full: no start would do better
fi
same=0
for ((start = restarts; start >= 0; start--)); do
  failed_at=/shared/runs/xxl/slurm/attempts/$job/$start/failed-at
  [[ -f $failed_at && $(<"$failed_at") == "$position" ]] || break
  ((same++))
done
if ((code == 2)); then # a mistake that a person must mend
  next="not requeued"
elif ((same >= 3)); then
  next="not requeued: failed $same times in a row at the same point (${position:-before it began}); find out why first"
elif ((restarts >= max_requeues)); then
  next="not requeued: $restarts times are enough; submit again to go on"
elif trap '' TERM && scontrol requeue "$job"; then # which ends this script, but not before its last words
  next="requeued, $((restarts + 1)) of at most $max_requeues times"
else
  next="not requeued: Slurm refused; submit again to go on"
fi
echo "-- $SLURM_JOB_NAME: exit code $code, $next" >&2
echo "$message" >&2
exit "$code"
