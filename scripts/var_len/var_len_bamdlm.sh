#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Texts of any length by BAM-DLM: var_len_bamdlm.sh seed=3; $CHECKPOINT, else the published one;
# $BLOCK_SIZE is 4, 8 or 16.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
texts_of_published var_len_bamdlm 16 "$@"
