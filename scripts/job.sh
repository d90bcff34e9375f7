# The one header of every script here; sourced, with $root set to the repository.
#
#   bash scripts/train/train_owt_bamdlm.sh              here; OVERRIDES may follow and come last
#   bash scripts/train/train_owt_bamdlm.sh --dry-run    prints the command
#   sbatch scripts/train/train_owt_bamdlm.sh            as a job
#
# Nothing of a site is in these files. Partition, GPUs, time, account … come from sbatch's command line
# (sbatch -p gpu --gpus-per-node=8 --ntasks-per-node=8 -t 2-0 …) or its environment (SBATCH_PARTITION …).
# The log is %x_%j.log in the folder of the submission. Ahead of the time limit, and on
# `scancel --signal=USR1`, the run is told to stop and the job goes back into the queue: the same command
# goes on with the same run. A preempted job is requeued by Slurm itself. The number of an array's task is
# its seed: sbatch --array=1-12 scripts/gen_ppl/gen_ppl_ar.sh
#
#   BAMDLM_PYTHON=…      the interpreter; else .venv/bin/python, else python
#   BAMDLM_TORCHRUN=N    without Slurm: N processes under torchrun
set -euo pipefail
root=$(cd "$root" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
cd "$root"

python=${BAMDLM_PYTHON:-}
if [[ -z $python ]]; then
  python=python
  if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
fi

# Slurm runs a copy of the submitted script, which lies outside the repository.
in_job=
if [[ -n ${SLURM_JOB_ID:-} && $here/ != "$root"/* ]]; then in_job=1; fi

dry=
for argument in "$@"; do
  if [[ $argument == --help ]]; then
    sed -n '/^#SBATCH/d; 2,/^[^#]/s/^# //p' "$0"
    echo
    sed -n '3,/^set/s/^# \{0,1\}//p' scripts/job.sh
    exit
  fi
  if [[ $argument == --dry-run ]]; then dry=1; fi
done

# run PROGRAM ARGUMENTS: the program under srun in a job, otherwise under torchrun or plain python.
run() {
  local program=$1 arguments=() start=() argument tasks
  shift
  for argument in "$@"; do
    if [[ $argument != --dry-run ]]; then arguments+=("$argument"); fi
  done
  if [[ $in_job && -n ${SLURM_ARRAY_TASK_ID:-} && $program == main.py ]]; then
    arguments=("seed=$SLURM_ARRAY_TASK_ID" ${arguments[@]+"${arguments[@]}"})
  elif [[ $in_job && -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    arguments=(--seed "$SLURM_ARRAY_TASK_ID" ${arguments[@]+"${arguments[@]}"})
  fi
  if [[ $in_job ]]; then
    start=(srun --kill-on-bad-exit=1)
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then # srun does not take it over by itself (22.05)
      start+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    fi
    tasks=$((${SLURM_NNODES:-1} * ${SLURM_GPUS_ON_NODE:-1}))
    # One process per GPU, also where --ntasks-per-node was forgotten.
    if [[ $program == main.py && -z ${SLURM_NTASKS_PER_NODE:-} && ${SLURM_NTASKS:-1} -lt $tasks ]]; then
      start+=("--ntasks=$tasks" "--ntasks-per-node=$SLURM_GPUS_ON_NODE" --overcommit)
    fi
    if [[ $program == main.py && ${SLURM_NNODES:-1} -gt 1 ]]; then
      arguments=("trainer.num_nodes=$SLURM_NNODES" ${arguments[@]+"${arguments[@]}"})
    fi
  fi
  start+=("$python" -u)
  if [[ -z $in_job && $program == main.py && -n ${BAMDLM_TORCHRUN:-} ]]; then
    start=("$python" -m torch.distributed.run --standalone "--nproc-per-node=$BAMDLM_TORCHRUN")
  fi
  supervise "${start[@]}" "$program" ${arguments[@]+"${arguments[@]}"}
}

# submit SCRIPT ARGUMENTS: one job, its log in watch_folder/; run here where there is no Slurm.
submit() {
  local start=(bash) arguments=() argument
  for argument in "$@"; do
    if [[ $argument != --dry-run ]]; then arguments+=("$argument"); fi
  done
  if [[ -z $in_job ]] && command -v sbatch >/dev/null; then
    start=(sbatch -o "watch_folder/%x_%j.log")
    if [[ -z $dry ]]; then mkdir -p watch_folder; fi
  fi
  supervise "${start[@]}" "${arguments[@]}"
}

# each_block_size ALGO SCRIPT ARGUMENTS: submits the script; bamdlm's for every published block size.
each_block_size() {
  local algo=$1 size
  shift
  if [[ $algo != bamdlm ]]; then submit "$@"; return; fi
  for size in ${BLOCK_SIZE:-4 8 16}; do BLOCK_SIZE=$size chosen="BLOCK_SIZE=$size " submit "$@"; done
}

# checkpoint DEFAULT: the overrides that load $CHECKPOINT, or DEFAULT: a .ckpt, an export, a hub id.
checkpoint() {
  local path=${CHECKPOINT:-$1}
  echo "eval.checkpoint_path=$path"
  if [[ $path == *.ckpt ]]; then echo algo.backbone=dit; else echo algo.backbone=hf_dit; fi
}

# texts EXPERIMENT ARGUMENTS: samples, in a file that is named after what they are.
texts() {
  run main.py "experiment=$1" \
    "sampling.logdir=sample_logs/$1_len\${model.length}_bs\${block_size}_seed\${seed}" "${@:2}"
}

# texts_of_published EXPERIMENT BLOCK_SIZE ARGUMENTS: the same of bamdlm; the block size is the default one.
texts_of_published() {
  local size=${BLOCK_SIZE:-$2} weights
  mapfile -t weights < <(checkpoint "kuleshov-group/bamdlm-owt-block_size$size")
  texts "$1" "block_size=$size" "${weights[@]}" "${@:3}"
}

# From here on a signal is kept and passed on to what runs.
child='' stopped=''
forward() {
  if [[ $child ]]; then kill "-$1" "$child" 2>/dev/null || true; fi
}
if [[ $in_job ]]; then
  trap 'stopped=USR1; forward USR1' USR1
  trap 'stopped=TERM; forward TERM' TERM
fi

# supervise COMMAND: prints it and runs it; in a job, requeues it when it was told to stop.
supervise() {
  local words
  words=$(printf '%q ' "$@")
  echo "${chosen:-}${words% }"
  if [[ $dry ]]; then return; fi
  if [[ -z $in_job ]]; then "$@"; return; fi
  local status=0
  "$@" &
  child=$!
  if [[ $stopped ]]; then forward "$stopped"; fi
  while true; do
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2>/dev/null || break # else a signal ended the wait, not the child
  done
  child=
  # 138: the step itself got USR1 before it could handle it. 75: it saved and asks to go on.
  if [[ $stopped == USR1 || $status == 138 || $status == 75 ]]; then
    echo "job $SLURM_JOB_ID goes back into the queue, to go on where it stopped"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
  fi
  if [[ $stopped || $status -ne 0 ]]; then exit "$status"; fi
}

