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
export SLURM_EXPORT_ENV=ALL
set +eu +o pipefail

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/submissions/20260101-000000-a1-1/%A_%a_%t_log.out --wait=90 /venv/bin/python -P -u -m submitit.core._submit /shared/submissions/20260101-000000-a1-1


# teardown
code=$?
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
restart="${SLURM_RESTART_COUNT:-0}"
record=/shared/submissions/20260101-000000-a1-1/"$job"
recorded() { [ "$(cat "${record}_$1" 2>/dev/null)" = "$restart" ]; }
if recorded ended; then exit "$code"; fi
delay=0
if [ "$code" -ne 0 ] && ! recorded claimed; then
  if { echo "$restart $code" >>"${record}_starts"; } 2>/dev/null
  then failed=$(wc -l <"${record}_starts")
  else last=$(cat "${record}_claimed" 2>/dev/null); failed=$((restart - ${last:--1})); fi
  if [ "$failed" -ge 5 ]; then
    echo "$failed starts in a row ended before training, the last with code $code; giving up" >&2
    exit 100
  fi
  delay=$((30 << (failed - 1)))
fi
if [ "$code" -eq 75 ] || { [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; }; then
  unset SLURM_CLUSTERS "${!SQUEUE_@}" "${!SCONTROL_@}"
  for try in {1..720}; do
    if answer="$(squeue -h -j "$job" -O State,RestartCnt 2>&1)"; then
      [[ $'\n'"$answer"$'\n' =~ $'\n'\ *RUNNING\ +"$restart"\ *$'\n' ]] || break
      if answer="$(scontrol requeue "$job" 2>&1)"; then
        [ "$delay" -eq 0 ] || (trap '' TERM; exec scontrol update "JobId=$job" "StartTime=now+$delay")
        sleep 300
        break
      fi
    fi
    case "$answer" in
      *[Cc]ontact*|*[Cc]onnect*|*[Tt]imed?out*|*transmitted*|*standby*|*[Aa]uthentication*)
        [ "$try" -gt 1 ] || echo "slurmctld does not answer, and is asked again for an hour: $answer" >&2
        sleep 5 ;;
      *) echo "the job does not return to the queue, but 'rsb-cluster retry' resumes the run: $answer" >&2; break ;;
    esac
  done
fi
exit "$code"
