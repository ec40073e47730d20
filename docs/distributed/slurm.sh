#!/bin/bash
# The workers of a merge, as a Slurm array: sbatch docs/distributed/slurm.sh BASE ADAPTER OUT
# All three must be on a file system that the nodes share. A task that is requeued keeps the parts that it has made.
#SBATCH --job-name=loratool
#SBATCH --array=1-16
#SBATCH --cpus-per-task=16
#SBATCH --mem=8G
#SBATCH --time=02:00:00
#SBATCH --requeue
set -euo pipefail
loratool merge "$1" "$2" -o "$3" --part auto
