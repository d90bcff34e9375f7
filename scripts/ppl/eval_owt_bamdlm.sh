#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Perplexity of BAM-DLM on OpenWebText; $BLOCK_SIZE is 4, 8 or 16, $CHECKPOINT else the published one.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
S=${BLOCK_SIZE:-4}
mapfile -t weights < <(checkpoint kuleshov-group/bamdlm-owt-block_size$S)
run main.py experiment=eval_owt_bamdlm block_size=$S "${weights[@]}" "$@"
