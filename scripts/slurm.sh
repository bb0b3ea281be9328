#!/bin/bash
# One process for each GPU of a Slurm job; saved and queued again when the time is over or the job is pushed aside.
#
#   sbatch --nodes=8 scripts/slurm.sh runs/my-run --recipe smollm2-135m --data data/corpus --mesh data=8,fsdp=8
#
# from the repository's root, on a file system that all nodes see. What follows the run folder is train_jax.py's. Every
# process must see all GPUs of its node (no --gpus-per-task): JAX takes the one that SLURM_LOCALID counts.
#SBATCH --job-name=smollm
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
run=$1
shift
# Whole checkpoints only: a save that was killed leaves a folder with another name.
resume=$(ls "$run/checkpoints" 2>/dev/null | grep -qx '[0-9][0-9]*' && echo --resume)
# Not killed on the first exit: each process saves its part, or says in its own way that another has gone.
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" scripts/train_jax.py --distributed --out "$run" $resume "$@"
code=$?
if [ "$code" -eq 75 ]; then # stopped by a signal after a verified save
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
