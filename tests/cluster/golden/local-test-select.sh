#!/bin/bash
# alsace_dist: select round 1
# Written by `alsace submit`, which also chains it to the others; `sbatch` takes it as it is.
#SBATCH --job-name='xxl: select round 1'
#SBATCH --output=/shared/runs/xxl/slurm/logs/04-select-round-1.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@60
#SBATCH --time=10
#SBATCH --partition=main
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1

# shellcheck disable=SC1003,SC1090,SC1091,SC2016  # values are quoted so that nothing in them counts

refuse() {
  echo "error: $1" >&2
  exit 2
}

# A stop signal, whenever it comes, goes on to the step, whose ranks agree on a point to stop at.
alsace_step='' alsace_told=''
forward() {
  alsace_told=1
  [[ -z $alsace_step ]] || kill -USR2 "$alsace_step" 2>/dev/null
}
trap forward USR1 USR2
echo "== $SLURM_JOB_NAME: job ${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID},\
 restart ${SLURM_RESTART_COUNT:-0}, $SLURM_JOB_NODELIST, $(date '+%F %T')"

# --- What srun would take from the session of whoever has submitted this by hand ---
# A step without these gets all of the job's memory, its cores and this script's environment.
unset SLURM_EXPORT_ENV "${!SLURM_MEM_PER_@}" "${!SLURM_CPU_BIND@}" SLURM_GRES SLURM_TIMELIMIT SLURM_EXACT SLURM_OVERLAP
unset SLURM_WHOLE SLURM_STDINMODE SLURM_STDOUTMODE SLURM_STDERRMODE "${!SRUN_@}"

# --- What a login shell reads, for `module` and `conda`: here and not by `bash -l`, which would be deaf meanwhile ---
alsace_path=$PATH
trap 'refuse "$alsace_file ends the job: it calls exit, or a command fails there under set -e or set -u"' EXIT
for alsace_file in /etc/profile ~/.bash_profile ~/.bash_login ~/.profile; do
  if [[ -r $alsace_file ]]; then
    . "$alsace_file"
    [[ $alsace_file == /etc/profile ]] || break
  fi
done
# This script goes on as it began, whatever those files have set for themselves.
trap - EXIT DEBUG ERR RETURN
trap forward USR1 USR2
set +efuvxC +o pipefail +o posix
shopt -u failglob nullglob nocasematch expand_aliases
IFS=$' \t\n'

# --- The site: software and environment, as its profile says ---
unset "${!ALSACE_@}" MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK # of whoever has submitted this
export MASTER_ADDR=127.0.0.1

# --- The run ---
set -uo pipefail
command -v srun >/dev/null || PATH=${PATH:-}:$alsace_path # a profile may have set it anew, or a module taken it away
command -v srun >/dev/null || refuse "srun is not on the PATH of this node; see environment and modules in the profile"
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
restarts=${SLURM_RESTART_COUNT:-0}
# Arithmetic would run what stands in brackets in a variable: only digits come to it.
[[ $job =~ ^[0-9]+(_[0-9]+)?$ ]] || refuse "no job of Slurm: SLURM_JOB_ID is not a number"
[[ $restarts =~ ^(0|[1-9][0-9]{0,5})$ ]] || refuse "SLURM_RESTART_COUNT is not a number"
max_requeues=5
((restarts <= max_requeues)) || refuse "requeued $restarts times; submit again to go on"
cd -- / || refuse "no working directory"
# What the ranks leave of this start of the job: their output, and the cause if they fail.
export ALSACE_ATTEMPT_DIR=/shared/runs/xxl/slurm/attempts/$job/$restarts
mkdir -p -- "$ALSACE_ATTEMPT_DIR" || refuse "cannot write into the run directory"
export ALSACE_LAUNCHER=none ALSACE_RANKS_PER_NODE=1
export ALSACE_LEAD_SECONDS=60 ALSACE_GPUS_PER_NODE=0

# --- The step, unless a signal has come already ---
status=75
if [[ -z $alsace_told ]]; then
  srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash /shared/runs/xxl/slurm/slurm_task.sh \
    /shared/python -m alsace_dist select /shared/runs/xxl/config.yaml --round=1 &
  alsace_step=$!
  [[ -z $alsace_told ]] || forward
  # A signal ends `wait`, not the step.
  wait "$alsace_step"
  status=$?
  while kill -0 "$alsace_step" 2>/dev/null; do
    wait "$alsace_step"
    status=$?
  done
  ((status <= 128)) || { wait "$alsace_step"; status=$?; } # it ended while a signal was taken
fi
((status == 0)) && exit 0

# --- The step has failed or was stopped: why, and does it go on? ---
code=$status message="the step ended with exit code $status; the lines above say why"
((status != 137)) || message="the step was killed (often: out of memory); the lines above say more"
# The signal has killed srun before it could take it (140), or bash has lost the status of a step that ended then (-1).
if [[ -n $alsace_told ]] && ((status == 75 || status == 140 || status < 0)); then
  code=75 message="told to stop before the step had begun or as it ended"
fi
# Causes are named cause-<0: own, 1: another rank failed>-<time>-<exit code>-<who>: the first one is the one to read.
for cause in "$ALSACE_ATTEMPT_DIR"/cause-*; do
  if [[ -f $cause && ${cause##*/} =~ ^cause-[01]-[0-9]+-([1-9][0-9]{0,2})- ]]; then
    code=${BASH_REMATCH[1]} message=$(<"$cause")
    break
  fi
done
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
# The controller may be away for a while. Only if it answers and refuses once more, it is a refusal.
requeue() {
  local pause=2 end=$((SECONDS + 300)) answers=''
  until scontrol requeue "$job"; do
    [[ -z $answers ]] && ((SECONDS < end)) || return 1
    sleep "$pause"
    ((pause = pause < 30 ? 2 * pause : 30))
    ! scontrol show job "$job" >/dev/null 2>&1 || answers=1
  done
}
if ((code == 2)); then # a mistake that a person must mend
  next="not requeued"
elif ((same >= 3)); then
  next="not requeued: failed $same times in a row at the same point (${position:-before it began}); find out why first"
elif ((restarts >= max_requeues)); then
  next="not requeued: $restarts times are enough; submit again to go on"
elif trap '' TERM && requeue; then # which ends this script, but not before its last words
  next="requeued, $((restarts + 1)) of at most $max_requeues times"
else
  next="not requeued: Slurm refused, or did not answer for minutes; submit again to go on"
fi
echo "-- $SLURM_JOB_NAME: exit code $code, $next" >&2
echo "$message" >&2
exit "$code"
