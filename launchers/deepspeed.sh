#!/bin/bash
# One stage over the machines of a hostfile, on clusters without Slurm: DeepSpeed's launcher reaches them by ssh.
#   HOSTFILE=hosts launchers/deepspeed.sh distill CONFIG.yaml --round=1
# The hostfile has a line per machine, such as `node1 slots=8`: its name and its ranks. The run directory, the data and
# this environment must lie on a disk that all of them share. NCCL_* variables travel through a file .deepspeed_env.
# DEEPSPEED_OPTIONS: further options of its launcher, such as "--master_port 29600 --master_addr 10.0.0.1".
set -euo pipefail
hostfile=${HOSTFILE:-/job/hostfile}
[[ -r $hostfile ]] || {
  echo "error: $hostfile: cannot be read; name a hostfile: HOSTFILE=... $0 ..." >&2
  exit 2
}
read -ra options <<<"${DEEPSPEED_OPTIONS:-}"
exec deepspeed --hostfile "$hostfile" "${options[@]}" --no_local_rank --module alsace_dist "$@"
