#!/usr/bin/env bash
# Everything about the GPUs here, in at most 8 minutes: are the numbers right, how fast are training
# and sampling, how does training scale. What each part finds is shown as it comes; one table and a
# line of JSON are the end. Exit code 1 where something is wrong.
#
#   bash benchmarks/gpu.sh            on the GPU machine, in the repository root
#   bash benchmarks/gpu.sh --check    exit code 1 also where a target is missed (an H100's)
#   bash benchmarks/gpu.sh --tiny     on a CPU, to try the script itself
#
# END says after how many seconds what still runs is ended (465; tests at half of it). OUT names a
# folder for what the parts leave (gpu_NAME.json, .xml, .log). BAMDLM_PYTHON names another Python
# than that of .venv. Wheels in .whl/ (hydra-core, omegaconf, antlr4, datasets ..., for a machine
# without a network) are unpacked to a folder of their own and put on PYTHONPATH.
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
END=${END:-465} PYTHON=${BAMDLM_PYTHON:-}
[[ $END =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: END=$END must be a number of seconds"; exit 2; }
case "$PYTHON" in */*) PYTHON=$(realpath -s "$PYTHON") ;; esac
[ -z "${OUT:-}" ] || OUT=$(realpath -sm "$OUT")
cd "$(dirname "$0")/.." || exit 1
if [ -z "$PYTHON" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
"$PYTHON" -c 'import torch' ||
  { echo "no torch in $PYTHON: set BAMDLM_PYTHON, or run scripts/setup.sh"; exit 2; }
gpus=1
if [ ${#tiny[@]} = 0 ]; then
  # one of a kind that CUDA_VISIBLE_DEVICES does not choose from
  gpus=$("$PYTHON" -c 'import torch
count = torch.accelerator.device_count()
print(count if torch.cuda.is_available() else min(count, 1))')
  [ "$gpus" -gt 0 ] || { echo "gpu.sh: no accelerator here; --tiny tries it on a CPU"; exit 2; }
fi
OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT" || exit 2
IFS=, read -ra gpu_ids <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
# processes run beside each other: none takes all cores, neither to compute nor to compile
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=8
[ ${#tiny[@]} = 0 ] || OMP_NUM_THREADS=1
if [ ${#tiny[@]} = 0 ] && compgen -G ".whl/*.whl" > /dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
rm -f "$OUT"/gpu_*.json "$OUT"/gpu_*.xml
workers=$(nproc)

share=$(mktemp -d)
clear() { rm -rf "$share" ${site:+"$site"}; } # who waits for a turn ends as well
stop() { # a process, before it starts another one, and those below it; not this one
  local child children
  children=$(pgrep -P "$1")
  [ "$1" = $$ ] || kill "$1" 2> /dev/null
  for child in $children; do stop "$child"; done
}
end() {
  trap - INT TERM
  echo "gpu.sh: stopped; what was done is in $OUT"
  stop $$
  clear
  exit 130
}
trap end INT TERM

left() { # seconds but so many; never 0, which is no limit to `timeout`
  local seconds=$((END - SECONDS - ${1:-0}))
  echo $((seconds > 1 ? seconds : 1))
}
part() { # name, script, its words; leaves gpu_NAME.json
  local begun=$SECONDS code
  timeout -k 10 "$(left)" "$PYTHON" -W ignore "benchmarks/$2" "${@:3}" "${tiny[@]}" \
    --out "$OUT/gpu_$1.json" 2>&1 | grep --line-buffered -v '^{' | sed -u "s/^/$1: /"
  code=${PIPESTATUS[0]}
  case "$code" in
    0) code= ;;
    124 | 137) code=", ended by END=$END" ;;
    *) code=", exit code $code" ;;
  esac
  echo "$1: $((SECONDS - begun)) s$code"
}
on() { # one of the GPUs, a command that sees no other
  CUDA_VISIBLE_DEVICES=${gpu_ids[$1]} "${@:2}"
}
suite() { # name, workers, tests to leave out, files; leaves gpu_NAME.xml unless interrupted
  local begun=$SECONDS
  OMP_NUM_THREADS=1 timeout -s INT -k 20 "$(left $((END / 2)))" "$PYTHON" -m pytest -q -W ignore \
    -m gpu -k "${3:+not ($3)}" -n "$2" --dist worksteal --tb=short --durations=5 \
    --junitxml="$OUT/gpu_$1.xml" $(printf 'tests/*/test_%s.py ' "${@:4}") &> "$OUT/gpu_$1.log"
  [ $? -le 1 ] || rm -f "$OUT/gpu_$1.xml"
  grep -v SKIPPED "$OUT/gpu_$1.log" | tail -25 | sed "s/^/$1: /"
  echo "$1: $((SECONDS - begun)) s"
}
start() { # a name, a command: compiles, and measures when its turn has come
  mkdir "$share/$1"
  timed="$timed $1"
  { "${@:2}" --turn "$share/$1"; touch "$share/$1"/{ready,done}; } &
}
start_one() { # a name, words: on the next of the GPUs
  queue[next]="${queue[next]-} $1"
  start "$1" on "$next" part "$@"
  next=$(((next + 1) % gpus))
}
train() { # a backend, algorithms
  start_one "$1_$2" gpu.py train --backend "$1" --algo "${@:2}" --seconds "$(left 45)"
}
until_all() { # a word, names: until all have come so far, or there is no time left
  local name
  for name in "${@:2}"; do
    until [ -e "$share/$name/$1" ] || [ "$SECONDS" -gt $((END + 12)) ]; do sleep 0.1; done
  done
}
turns() { # names, one after the other
  local name
  for name in "$@"; do
    [ -e "$share/$name/done" ] || touch "$share/$name/go"
    until_all done "$name"
  done
}

# what is right; beside it, what will be timed is compiled. tests_several leaves out what takes
# minutes: scripts/test.sh --gpu
echo "== at first all is compiled and checked, three minutes on an H100; files in $OUT"
timed='' queue=() next=0
start_one sample gpu.py sample
start_one parallel gpu.py parallel
for algorithms in bamdlm 'mdlm ar'; do
  [ ${#tiny[@]} != 0 ] || train flex $algorithms
  train sdpa $algorithms
done
if [ "$gpus" -gt 1 ] || [ ${#tiny[@]} != 0 ]; then
  start several part several gpu_several.py
else
  echo "several: not measured, this machine has one GPU"
fi
names="check tests$timed"
on 0 part check gpu.py check &
right=$!
suite tests $((workers < 8 ? workers : 8)) '' block_diffusion decode forward freeze graphs sampling \
  ssd_lm &
right="$right $!"
if [ "$gpus" -gt 1 ]; then
  names="$names tests_several"
  long="dies or moves or evaluate or texts or bits or (as_one and fsdp)"
  suite tests_several 3 "$long" gpus &
  right="$right $!"
fi
wait $right
until_all ready $timed
echo "== $SECONDS s: what is compiled is measured now"

# what is fast: all GPUs together, then each beside the others
[ ! -e "$share/several" ] || turns several
for each in "${queue[@]}"; do turns $each & done
wait
echo "== $SECONDS s, files in $OUT"
"$PYTHON" benchmarks/gpu_table.py "$OUT" $names "${check[@]}"
code=$?
clear
exit $code
