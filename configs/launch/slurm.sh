#!/usr/bin/env bash
# One training run on Slurm, requeued until it is done:
#
#     mkdir -p logs && sbatch configs/launch/slurm.sh configs/quickstart.yaml out=/shared/runs/mine
#
# with the environment activated in which `python -m mm` works. `out`, and the data, must be on a disk that all machines
# share. Slurm starts one process a GPU itself: torchrun would keep their exit statuses to itself (it returns 1 whatever
# they are).
#
#SBATCH --job-name=mm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log

# --signal: five minutes before the time limit (and when the job is preempted) the processes get SIGTERM, end the step,
# save, and exit with 75. Give them longer if a step and a save take longer.
set -uo pipefail

MOST_RESTARTS=50

# SIGTERM to the whole job must not end this shell before the processes have saved: it is heard when srun returns.
trap : TERM

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --wait: the others are given a minute after the first has ended, with whatever status; then they are killed.
srun --kill-on-bad-exit=0 --wait=60 \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m mm train "$@"' mm "$@" --resume
status=$?

# 75: stopped by SIGTERM, all saved. 76: some process did not come to a collective; the newest checkpoint is whole.
case $status in
75 | 76)
    if ((${SLURM_RESTART_COUNT:-0} >= MOST_RESTARTS)); then
        echo "status $status after $SLURM_RESTART_COUNT restarts: not queued again" >&2
        exit "$status"
    fi
    echo "status $status: queued again, to go on with --resume" >&2
    scontrol requeue "$SLURM_JOB_ID"
    ;;
*) exit "$status" ;;
esac
