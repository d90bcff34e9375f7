#!/usr/bin/env bash
# The study of docs/results.md: ways of drawing noise x block sizes x corpora x seeds, their table and picture.
#   bash scripts/study.sh --jobs 4          # --help says more
# Run again after an interruption it goes on where it was; run again after the end it only draws.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
exec "${BAMDLM_PYTHON:-$root/.venv/bin/python}" "$root/scripts/support/study.py" "$@"
