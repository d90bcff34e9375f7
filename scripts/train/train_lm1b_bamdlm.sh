#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Trains BAM-DLM on LM1B, 150K steps from $PRETRAIN_CKPT, an MDLM run of 850K steps
# (unset: from scratch); $BLOCK_SIZE is 4, 8 or 16.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
S=${BLOCK_SIZE:-4}
run main.py experiment=train_lm1b_bamdlm block_size=$S wandb.name=bamdlm-lm1b-block_size$S "$@"
