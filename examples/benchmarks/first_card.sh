#!/usr/bin/env bash
# The first minutes on a card: smoke test, tests, sanitizer, profile and benchmark, in this order,
# each within its time and each result on disk as soon as it is known; ten minutes by their limits.
#
#     bash examples/benchmarks/first_card.sh [folder]
#
# Needs a CUDA device, CuPy, and what the tests need: python -m pip install -e ".[test,cuda13]".
set -uo pipefail
out=$(realpath -m "${1:-first_card}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

# stage NAME SECONDS COMMAND...: the next stage runs whatever this one says.
stage() {
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
  printf '%-10s exit %3d  %3d s  %s\n' "$name" $? $((SECONDS - began)) "$out/$name.log" |
    tee -a "$out/stages.txt"
}

: >"$out/stages.txt"
timeout 10 nvidia-smi -q >"$out/nvidia-smi.txt" 2>&1
timeout 10 python -m pip freeze >"$out/packages.txt" 2>&1
tests=tests/ops/test_gpu.py
stage smoke 60 python -m pytest -m gpu -x -q -k smoke "$tests"
stage tests 150 python -m pytest -m gpu -q --durations=10 -k "not sanitizer and not smoke" "$tests"
stage sanitizer 110 python -m pytest -m gpu -q -k sanitizer "$tests"
if command -v ncu >/dev/null; then
  stage profile 55 ncu --set basic --launch-count 40 -o "$out/profile" \
    python -m pytest -m gpu -q -k smoke "$tests"
fi
stage benchmark 175 python examples/benchmarks/gpu.py --output "$out/gpu.json"
