#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Perplexity of SEDD on LM1B: $CHECKPOINT, else the newest under outputs/.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
run main.py experiment=eval_lm1b_sedd "$@"
