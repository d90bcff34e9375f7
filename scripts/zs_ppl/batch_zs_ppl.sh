#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# Every data set with every algorithm, one job each; --dry-run prints them.
# ALGOS="ar mdlm" and BLOCK_SIZE=16 choose fewer.
root=$(dirname "$0")/../..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
for data in ag_news scientific_papers_{pubmed,arxiv} lambada wikitext2 wikitext103 ptb lm1b-gpt2; do
  for algo in ${ALGOS:-ar sedd mdlm bamdlm}; do
    each_block_size "$algo" "scripts/zs_ppl/zs_ppl_$algo.sh" "data=$data" "$@"
done; done
