#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Texts by SEDD, which ends at its training length: var_len_sedd.sh seed=3; $CHECKPOINT,
# else the newest under outputs/.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
texts var_len_sedd "$@"
