#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=24
#SBATCH --error=TMP/sweep/slurm/%j_0_log.err
#SBATCH --gpus-per-node=8
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=TMP/sweep/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --signal=USR2@300
#SBATCH --time=60
#SBATCH --wckey=submitit

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output TMP/sweep/slurm/%j_%t_log.out --error TMP/sweep/slurm/%j_%t_log.err --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit TMP/sweep/slurm
