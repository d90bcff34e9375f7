#!/usr/bin/env bash
# Everything about the GPUs here, in at most 8 minutes: are the numbers right, how fast are training
# and sampling, how does training scale. What each part finds is shown as it comes; one table and a
# line of JSON are the end. Exit code 1 where something is wrong.
#
#   bash benchmarks/gpu.sh            on the GPU machine, in the repository root
#   bash benchmarks/gpu.sh --check    exit code 1 also where a target is missed (an H100's)
#   bash benchmarks/gpu.sh --tiny     on a CPU, to try the script itself
#
# END says after how many seconds what still runs is ended (465). OUT names a folder for what the
# parts leave (gpu_NAME.json, .xml, .log). BAMDLM_PYTHON names another Python than that of .venv.
# Wheels in .whl/ (hydra-core, omegaconf, antlr4, datasets ..., for a machine without a network) are
# unpacked to a folder of their own and put on PYTHONPATH.
set -u
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; }
case "$#:${1:-}" in
  0: | 1:--check | 1:--tiny) ;;
  1:-h | 1:--help) usage; exit 0 ;;
  *) echo "gpu.sh: it takes --check or --tiny or nothing, not: $*"; echo; usage; exit 2 ;;
esac
check=() tiny=()
[ "${1:-}" = --check ] && check=(--check)
[ "${1:-}" = --tiny ] && tiny=(--tiny)
OUT=${OUT:-$(mktemp -d)} END=${END:-465} PYTHON=${BAMDLM_PYTHON:-}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
case "$PYTHON" in */*) PYTHON=$(realpath -s "$PYTHON") ;; esac
cd "$(dirname "$0")/.." || exit 1
if [ -z "$PYTHON" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
"$PYTHON" -c 'import torch' ||
  { echo "no torch in $PYTHON: set BAMDLM_PYTHON, or run scripts/setup.sh"; exit 2; }
gpus=1
if [ ${#tiny[@]} = 0 ]; then
  gpus=$("$PYTHON" -c 'import torch; print(torch.accelerator.device_count())')
  [ "$gpus" -gt 0 ] || { echo "gpu.sh: no accelerator here; --tiny tries it on a CPU"; exit 2; }
fi
# processes that compile, each with so many of its own, run beside each other
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=8
if [ ${#tiny[@]} = 0 ] && compgen -G ".whl/*.whl" > /dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
rm -f "$OUT"/gpu_*.json "$OUT"/gpu_*.xml
workers=$(nproc)

stop() { # a process, before it starts another one, and those below it; not this one
  local child children
  children=$(pgrep -P "$1")
  [ "$1" = $$ ] || kill "$1" 2> /dev/null
  for child in $children; do stop "$child"; done
}
trap 'trap - INT TERM; echo "gpu.sh: stopped"; stop $$; exit 130' INT TERM

left() { # seconds but so many; never 0, which is no limit to `timeout`
  local seconds=$((END - SECONDS - ${1:-0}))
  echo $((seconds > 1 ? seconds : 1))
}
part() { # name, script, its words; leaves gpu_NAME.json
  local begun=$SECONDS
  timeout "$(left)" "$PYTHON" -W ignore "benchmarks/$2" "${@:3}" "${tiny[@]}" \
    --out "$OUT/gpu_$1.json" 2>&1 | grep --line-buffered -v '^{' | sed -u "s/^/$1: /"
  echo "$1: $((SECONDS - begun)) s"
}
suite() { # name, files; leaves gpu_NAME.xml unless they were interrupted
  local begun=$SECONDS # the tests in which processes die take minutes: scripts/test.sh --gpu
  timeout -s INT -k 20 "$(left $((END / 2)))" "$PYTHON" -m pytest -q -W ignore -m gpu \
    -k "not dies" -n $((workers < 8 ? workers : 8)) --tb=short --junitxml="$OUT/gpu_$1.xml" \
    $(printf 'tests/test_%s.py ' "${@:2}") &> "$OUT/gpu_$1.log"
  [ $? -le 1 ] || rm -f "$OUT/gpu_$1.xml"
  grep -v SKIPPED "$OUT/gpu_$1.log" | tail -25 | sed "s/^/$1: /"
  echo "$1: $((SECONDS - begun)) s"
}

# what is right; beside it, what will be timed is compiled, each on its own device if there are two
part check gpu.py check &
if [ "$gpus" -gt 1 ]; then
  suite tests_several gpus &
  part compile_sdpa gpu.py compile_train --of sdpa --index 1 &
  part compile_sample gpu.py compile_sample --index 1 &
  part compile_flex gpu.py compile_train --of flex --index 0 &
elif [ ${#tiny[@]} = 0 ]; then # at most two networks that are trained at a time: 57 GiB
  part compile_flex gpu.py compile_train --of flex &
  part compile_rest gpu.py compile_sample compile_train --of sdpa &
fi
suite tests decode forward freeze graphs sampling ssd_lm &
wait # never for a process in the foreground: a signal would wait as well

# what is fast
names="check tests sample train_sdpa"
if [ ${#tiny[@]} != 0 ]; then
  names="$names several"
  { part sample gpu.py sample; part train_sdpa gpu.py train --of sdpa; } &
  wait
  part several gpu_several.py &
elif [ "$gpus" -gt 1 ]; then
  names="$names train_flex tests_several several"
  part several gpu_several.py &
  wait
  part train_flex gpu.py train --of flex --index 0 --seconds "$(left 35)" &
  {
    part sample gpu.py sample --index 1
    part train_sdpa gpu.py train --of sdpa --index 1 --seconds "$(left 35)"
  } &
else
  names="$names train_flex"
  {
    part sample gpu.py sample
    part train_flex gpu.py train --of flex --seconds "$(left 140)"
    part train_sdpa gpu.py train --of sdpa --seconds "$(left 35)"
    echo "several: not measured, this machine has one GPU"
  } &
fi
wait
echo "== $SECONDS s, files in $OUT"
exec "$PYTHON" benchmarks/gpu_table.py "$OUT" $names "${check[@]}"
