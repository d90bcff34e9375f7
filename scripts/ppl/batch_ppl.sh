#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Perplexity of every algorithm on OpenWebText and LM1B, one job each; --dry-run prints them.
# ALGOS="ar mdlm" and BLOCK_SIZE=16 choose fewer.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
for data in owt lm1b; do for algo in ${ALGOS:-ar sedd mdlm bamdlm}; do
  each_block_size "$algo" "scripts/ppl/eval_${data}_$algo.sh" "$@"
done; done
