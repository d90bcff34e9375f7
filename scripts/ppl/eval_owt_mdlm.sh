#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Perplexity of MDLM on OpenWebText: $CHECKPOINT, else the newest under outputs/.
# The weights of the MDLM paper need algo.mdlm_loss_scale=true.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
run main.py experiment=eval_owt_mdlm "$@"
