#!/usr/bin/env bash
# Set-up if it is missing, style, tests. `--slow` adds the minutes-long tests, `--gpu` runs those that need a CUDA device;
# everything else goes to pytest: bash scripts/test.sh tests/data/test_data.py -x
set -euo pipefail
if [[ ${1:-} == --help ]]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

slow="not slow" gpu="not gpu" rest=()
for argument in "$@"; do
  case "$argument" in
    --slow) slow="" ;;
    --gpu) gpu="gpu" slow="" ;;
    *) rest+=("$argument") ;;
  esac
done
marks="$slow${slow:+ and }$gpu"

bash scripts/setup.sh
python=${BAMDLM_PYTHON:-.venv/bin/python}
unset PYTHONDONTWRITEBYTECODE # the asserts of tests are rewritten once, not in each run
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false # a worker computes on one core

style=0 # a fault of style is reported, and the tests run all the same
"$python" -m ruff check . || style=$?
"$python" -m ruff format --check . || style=$?
# three workers on two cores: some tests wait for processes that they started
"$python" -m pytest -n 3 --dist worksteal -m "$marks" "${rest[@]}"
exit "$style"
