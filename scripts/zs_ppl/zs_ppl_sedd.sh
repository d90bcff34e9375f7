#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Zero-shot perplexity of SEDD trained on OpenWebText: zs_ppl_sedd.sh data=ptb; $CHECKPOINT,
# else the newest under outputs/.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
run main.py experiment=zs_ppl_sedd "$@"
