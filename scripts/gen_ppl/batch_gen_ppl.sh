#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# 12 seeds × 2 lengths of every algorithm (SEDD: length 1024), 25 texts a job; --dry-run prints them.
# ALGOS="ar mdlm" and BLOCK_SIZE=16 choose fewer.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
for seed in {1..12}; do for algo in ${ALGOS:-ar sedd mdlm bamdlm}; do for length in 1024 2048; do
  if [[ $algo-$length == sedd-2048 ]]; then continue; fi
  each_block_size "$algo" "scripts/gen_ppl/gen_ppl_$algo.sh" "seed=$seed" "model.length=$length" "$@"
done; done; done
