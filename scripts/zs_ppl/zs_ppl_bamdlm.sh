#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Zero-shot perplexity of BAM-DLM trained on OpenWebText: zs_ppl_bamdlm.sh data=ptb; $CHECKPOINT,
# else the published one; $BLOCK_SIZE is 4, 8 or 16.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
S=${BLOCK_SIZE:-4}
mapfile -t weights < <(checkpoint kuleshov-group/bamdlm-owt-block_size$S)
run main.py experiment=zs_ppl_bamdlm block_size=$S "${weights[@]}" "$@"
