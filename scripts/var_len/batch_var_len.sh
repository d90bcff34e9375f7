#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# 20 seeds of every algorithm, one job each; --dry-run prints them. ALGOS="ar sedd" chooses fewer.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
for seed in {1..20}; do for algo in ${ALGOS:-ar bamdlm sedd}; do
  submit "scripts/var_len/var_len_$algo.sh" "seed=$seed" "$@"
done; done
