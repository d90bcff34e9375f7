#!/usr/bin/env bash
# From a bare machine to a trained, evaluated and sampled block-diffusion language model.
#   bash scripts/quickstart.sh
# Run again after an interruption it goes on where it was; run again after the end it does nothing twice.
set -euo pipefail
if [[ ${1:-} == --help ]]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
python=${BAMDLM_PYTHON:-.venv/bin/python}

run=(experiment=quickstart "$@")
folder=outputs/quickstart
write=("${run[@]}" mode=sample_eval model.length=512 sampling.context_size=128 sampling.batch_size=8
  eval.checkpoint_path=$folder/checkpoints/last.ckpt sampling.logdir=$folder/samples.csv
  eval.gen_ppl_eval_model_name_or_path=null checkpointing.save_dir=$folder)
run+=(checkpointing.save_dir=$folder)

echo "== train"
"$python" main.py "${run[@]}"
echo "== evaluate on the held-out plays"
"$python" main.py "${run[@]}" mode=ppl_eval trainer.limit_val_batches=null \
  eval.checkpoint_path=$folder/checkpoints/last.ckpt
echo "== write texts four times as long as the training context"
"$python" main.py "${write[@]}"
echo "== report"
"$python" scripts/support/quickstart_report.py "${run[@]}" -- "${write[@]}"
