#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# SSD-LM samples, generate_text.py's options as they are; the same command goes on with the same file.
root=$(dirname "$0")/..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
run ssd-lm/generate_text.py "$@"
