#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Texts of any length by AR: var_len_ar.sh seed=3; $CHECKPOINT, else the newest under outputs/.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
texts var_len_ar "$@"
