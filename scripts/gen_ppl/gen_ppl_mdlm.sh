#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Texts of MDLM and their generative perplexity: gen_ppl_mdlm.sh seed=3 model.length=2048; $CHECKPOINT,
# else the newest under outputs/.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
texts gen_ppl_mdlm "$@"
