#!/usr/bin/env bash
# Everything about the GPUs here: one in under 8 minutes, several in up to 4 more; prints tables and
# writes $OUT/gpu_PART.json. Exit code 1 where something is wrong.
#
#   bash benchmarks/gpu.sh            on the GPU machine, in the repository root
#   bash benchmarks/gpu.sh --check    exit code 1 also where a target is missed (an H100's)
#   bash benchmarks/gpu.sh --tiny     on a CPU, to try the script itself
#
# BAMDLM_PYTHON names another Python than that of .venv. Wheels in .whl/ (hydra-core, omegaconf,
# antlr4: nothing can be fetched there) are unpacked to a folder of their own and put on PYTHONPATH.
set -u
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; }
case "$#:${1:-}" in
  0: | 1:--check | 1:--tiny) ;;
  1:-h | 1:--help) usage; exit 0 ;;
  *) echo "gpu.sh: it takes --check or --tiny or nothing, not: $*"; echo; usage; exit 2 ;;
esac
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-/tmp}
PYTHON=${BAMDLM_PYTHON:-}
if [ -z "$PYTHON" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
"$PYTHON" -c 'import torch' || { echo "no torch in $PYTHON: set BAMDLM_PYTHON, or run scripts/setup.sh"; exit 2; }
export PYTHONUNBUFFERED=1
if [ "${1:-}" != --tiny ] && compgen -G ".whl/*.whl" > /dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
code=0
part() { # name, seconds
  echo "== $1"
  timeout "$2" "$PYTHON" benchmarks/gpu.py "${@:3}" "$1" --out "$OUT/gpu_$1.json" | grep --line-buffered -v '^{'
  [ "${PIPESTATUS[0]}" = 0 ] || { echo "$1 ended early or found something wrong"; code=1; }
}
part check 90 "$@"
echo "== tests: recordings in float32 and bf16, steps and samplers that never wait, SSD-LM"
tests="tests/test_forward.py tests/test_decode.py tests/test_freeze.py tests/test_graphs.py tests/test_sampling.py tests/test_ssd_lm.py"
if [ "${1:-}" = --tiny ]; then echo "(all but a few are skipped without a GPU)"; fi
timeout 110 "$PYTHON" -m pytest -q -W ignore -m gpu $tests | grep -v SKIPPED | tail -12
[ "${PIPESTATUS[0]}" = 0 ] || code=1
part sample 150 "$@"
part train 200 "$@"
gpus=$("$PYTHON" -c 'import torch; print(torch.accelerator.device_count())')
if [ "$gpus" -gt 1 ] || [ "${1:-}" = --tiny ]; then
  echo "== several GPUs"
  timeout 240 "$PYTHON" benchmarks/gpu_several.py "$@" | grep --line-buffered -v '^{'
  [ "${PIPESTATUS[0]}" = 0 ] || { echo "several GPUs: ended early or found something wrong"; code=1; }
else
  echo "== several GPUs: skipped, this machine has $gpus"
fi
exit $code
