#!/usr/bin/env bash
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=B:USR1@120
# SSD-LM samples: seeds × lengths × steps, one job each, 25 samples a job; --dry-run prints them.
# SEEDS="1 2" chooses fewer; options of generate_text.py may follow (--model_name_or_path FOLDER).
root=$(dirname "$0")/..; [[ -f $root/scripts/job.sh ]] || root=$SLURM_SUBMIT_DIR
source "$root/scripts/job.sh"
for seed in ${SEEDS:-$(seq 12)}; do for length in 1025 2050; do for steps in 1000 25; do
  submit ssd-lm/generate_text.sh --num_samples_to_generate 25 \
    --max_seq_length "$length" --total_t "$steps" --seed "$seed" "$@"
done; done; done
