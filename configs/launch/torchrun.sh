#!/usr/bin/env bash
# One training run on several machines without a scheduler. Start the same command on each of them:
#
#     HEAD=node0 NODES=2 configs/launch/torchrun.sh configs/quickstart.yaml out=/shared/runs/mine
#
# HEAD is one of the machines, and all reach its port PORT (29500). GPUs is how many processes each starts: by default
# one for every GPU. `out`, and the data, must be on a disk that all machines share.
#
# Ctrl-C or SIGTERM to one of these scripts saves the run and ends it everywhere; the same command goes on with it.
# torchrun would give processes 30 seconds to do so and kill them then: SAVE_SECONDS (600) is how long they get here.
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:?how many machines}" \
    --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:?the name of one of the machines}:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-mm}" \
    --shutdown-timeout "${SAVE_SECONDS:-600}" \
    -m mm train "$@" --resume
