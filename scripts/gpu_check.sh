#!/bin/bash
# Everything that only a GPU can show, in one command within ten minutes: exports, builds, runs, parity, speed.
#
#     scripts/gpu_check.sh [--backend tensorrt|tensorrt-rtx|none] [--output artifacts/gpu-check] [--minutes 9.5]
#
# `make gpu-check` installs what it needs first, with TensorRT for RTX. Writes gpu-check.json into the output directory
# after each step. Exit code 0: all steps went well. 1: a step failed, or there is no GPU that can be used; the JSON and
# the last line say what. 130: interrupted. PYTHON chooses the interpreter.
set -euo pipefail
folder=$PWD
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "Error: no interpreter at $python; run \`make gpu-check\`, or give one with PYTHON=" >&2
    exit 1
fi
[[ $python == */* && $python != /* ]] && python=$folder/$python
cd "$root"
exec "$python" -m scripts.gpu_check --called-from "$folder" "$@"
