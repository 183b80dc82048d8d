#!/bin/bash
# One stage on this machine's ranks, through torchrun: launchers/local.sh distill CONFIG.yaml --round=1
# NUM_PROCESSES: how many ranks; default: one per GPU, without GPUs one per core.
# (`alsace distill CONFIG.yaml` does the same by itself, and `alsace run CONFIG.yaml` every stage.)
set -euo pipefail
if [[ -z ${NUM_PROCESSES:-} ]]; then
  NUM_PROCESSES=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  ((NUM_PROCESSES)) || NUM_PROCESSES=$(nproc)
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc-per-node="$NUM_PROCESSES" -m alsace_dist "$@"
