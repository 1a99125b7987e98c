#!/bin/bash
# Everything that only a GPU can show, in one command within ten minutes: exports, builds, runs, parity, speed.
#
#     scripts/gpu_check.sh [--backend tensorrt|tensorrt-rtx] [--output artifacts/gpu-check] [--minutes 9.5]
#
# Writes gpu-check.json into the output directory after each step. Exit code 0: all steps went well. 1: a step failed,
# or there is no GPU that can be used; the JSON and the last line say what. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "Error: no interpreter at $python; run \`make test\` once, or give one with PYTHON=" >&2
    exit 1
fi
exec "$python" -m scripts.gpu_check "$@"
