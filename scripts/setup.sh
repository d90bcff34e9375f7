#!/usr/bin/env bash
# Makes .venv with the pinned requirements. Does nothing when they are installed already; mends an install that was killed.
#   bash scripts/setup.sh
#   BAMDLM_PYTHON=/path/to/python   use that environment as it is (it must have torch); nothing is installed
#   BAMDLM_TORCH_INDEX=URL          one more package index, e.g. PyTorch's own for CPU builds
set -euo pipefail
if [[ ${1:-} == --help ]]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [[ -n "${BAMDLM_PYTHON:-}" ]]; then
  "$BAMDLM_PYTHON" -c 'import torch, lightning, hydra, transformers, datasets' ||
    fail "BAMDLM_PYTHON=$BAMDLM_PYTHON lacks the packages named above; install requirements.txt there or unset BAMDLM_PYTHON"
  exit 0
fi

lists=(requirements.txt requirements-no-deps.txt constraints-cpu.txt)
stamp=.venv/.bamdlm-installed       # what was installed, written last
unfinished=.venv/.bamdlm-installing # there while an install runs: found at the start, the last one was killed
wanted=$(cat "${lists[@]}" | sha256sum | cut -d' ' -f1)

if [[ ! -e "$unfinished" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]] && recent .venv/bin/python; then
  exit 0
fi

mkdir -p .venv
exec 9>.venv/.bamdlm-lock
if ! flock -n 9; then
  echo "setup: another setup is at work here; waiting for it"
  flock 9
  [[ ! -e "$unfinished" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]] && exit 0
fi

if ! { recent .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
  python=
  for candidate in python3.11 python3 python3.12 python3.13 python; do
    if recent "$candidate"; then python=$candidate && break; fi
  done
  [[ -n "$python" ]] || fail "needs Python 3.11 or newer; the newest here is: $(python3 --version 2>&1 || true)"
  echo "setup: 1/3 making .venv with $("$python" --version) ..."
  touch "$unfinished"
  find .venv -mindepth 1 -maxdepth 1 ! -name '.bamdlm-*' -exec rm -rf {} +
  "$python" -m venv .venv || fail "$python cannot make a virtual environment (on Debian: apt-get install python3-venv)"
fi

touch "$unfinished"
# pip writes a package's RECORD last, so a package without it is half there and pip would not look at it again.
for info in .venv/lib/python3*/site-packages/*.dist-info; do
  if [[ -d "$info" && ! -e "$info/RECORD" ]]; then
    echo "setup: $(basename "$info" .dist-info) was only half installed; once more"
    rm -rf "$info"
  fi
done

options=(--disable-pip-version-check)
[[ -t 1 ]] || options+=(--progress-bar off)
[[ -n "${BAMDLM_TORCH_INDEX:-}" ]] && options+=(--extra-index-url "$BAMDLM_TORCH_INDEX")
constraints=()
command -v nvidia-smi >/dev/null || constraints=(-c constraints-cpu.txt)
echo "setup: 2/3 installing $(grep -c == requirements.txt) pinned packages and what they need (1-3 minutes) ..."
# grep: a local package index that lacks a package makes pip warn once per package
.venv/bin/python -m pip install "${options[@]}" "${constraints[@]}" -r requirements.txt \
  2> >(grep -v "is ignored: it is neither a file nor" >&2) |
  grep --line-buffered -E '^(Collecting|Downloading|Installing|Successfully)' | cut -c1-120 || true
.venv/bin/python -m pip install "${options[@]}" --quiet --no-deps -r requirements-no-deps.txt \
  2> >(grep -v "is ignored: it is neither a file nor" >&2)

echo "setup: 3/3 checking the versions ..."
.venv/bin/python - "${lists[@]:0:2}" <<'PYTHON' || fail "the install is not complete (see above); run scripts/setup.sh again"
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

wrong = []
for line in "\n".join(Path(name).read_text() for name in sys.argv[1:]).splitlines():
    name, _, wanted = line.partition("==")
    if not wanted or line.startswith("#"):
        continue
    try:
        found = version(name.partition("[")[0])  # without extras
    except PackageNotFoundError:
        found = "nothing"
    if found.partition("+")[0] != wanted:  # +cpu, +cu128: a build of the same version
        wrong.append(f"{name}: {wanted} wanted, {found} installed")
print("\n".join(wrong), end="", file=sys.stderr)
sys.exit(bool(wrong))
PYTHON
echo "$wanted" >"$stamp.new" && mv "$stamp.new" "$stamp"
rm -f "$unfinished"
echo "setup: done; the environment is .venv"
