#!/usr/bin/env bash
# The check of a machine with a GPU and without network, in five calls of at most ten minutes
# (Python 3.10 or later, torch with CUDA, nvcc, scikit-build-core, pybind11, pytest, hypothesis;
# compute-sanitizer, ncu and cuobjdump: a step whose tool is missing fails):
#
#   bash bench/gpu.sh correct    build, kernel tests, trials, CUDA against the CPU
#   bash bench/gpu.sh anchors    what the card and its libraries can do: the baselines
#   bash bench/gpu.sh ours       truncated_svd by stage, kernels against torch
#   bash bench/gpu.sh why        profiler, SDXL to SSD-1B from file to file, a step of a fit, ncu
#   bash bench/gpu.sh sanitize   compute-sanitizer over each kernel
#
# Every number is appended to $OUT/results.jsonl (default: out/) when it is known; logs are in
# $OUT/logs.tar.gz. Each call ends by writing all numbers so far into $OUT/gpu.json and printing
# where to send that file; `python -m gpu.render` reads it, too. A number beyond its limit, NaN, or no GPU that runs the
# kernels fails the call (1); a step that there was no time for leaves it incomplete (2). Nothing touches the clocks. COMMIT names the commit in a copy without history. A call runs what is neither there nor in bench/results/gpu.jsonl, for this card
# and these sources, and ends in time. `python -m gpu.render` makes the tables of the results.
# --dry (or DRY=1): everything on the CPU at toy size, which says whether the script works.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export OUT=${OUT:-$root/out} PYTHONUNBUFFERED=1 CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-16}
cd "$root/bench"
exec python3 -m gpu "$@"
