#!/bin/bash

# Parameters
#SBATCH --array=0-2%2
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --job-name=a1-resnet50-s0-12345678
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/submissions/20260101-000000-a1-1/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
trap : TERM USR2
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/submissions/20260101-000000-a1-1/%A_%a_%t_log.out --wait=90 /venv/bin/python -u -m submitit.core._submit /shared/submissions/20260101-000000-a1-1


# teardown
code=$?
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
if [ "$code" -eq 75 ] || { [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; }; then
  read -r state restarts <<<"$(squeue -h -j "$job" -O State,RestartCnt)"
  if [ "$state $restarts" = "RUNNING ${SLURM_RESTART_COUNT:-0}" ]; then scontrol requeue "$job" && sleep 300; fi
fi
exit "$code"
