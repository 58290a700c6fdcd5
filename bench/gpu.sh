#!/usr/bin/env bash
# The whole GPU check in one command, for a machine with a card and without network (Python 3.12,
# torch with CUDA, nvcc 13, scikit-build-core, pybind11, pytest, pytest-benchmark, hypothesis):
# builds for the card, runs the cuda tests, compute-sanitizer over the small ones, and the benches
# against their named baselines. Results go to $OUT (default: out/): logs and JSON, with card, date
# and commit. Exit code: that of the tests.
#
#   bash bench/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
export OUT=${OUT:-$PWD/out} PYTHONUNBUFFERED=1 CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-16}
mkdir -p "$OUT"
{
  date -u +%F
  nvidia-smi -L
  nvcc --version | tail -n 1
  git describe --always --dirty 2>/dev/null
  python3 -c 'import torch; print("torch", torch.__version__)'
} | tee "$OUT/machine.txt"

python3 -m pip install -q --no-index --no-build-isolation --no-deps . \
  -Ccmake.define.PROLORA_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native \
  >"$OUT/build.log" 2>&1 || { tail -n 30 "$OUT/build.log"; exit 1; }

# Outside the tree, so that the installed package is the one under test.
cd "$OUT"
python3 -m prolora info
export PROLORA_REQUIRE=cpu,cuda
kernels=("$root"/tests/test_split_project.py "$root"/tests/test_overlap.py "$root"/tests/test_small_svd.py)
timeout 150 python3 -m pytest -q -p no:cacheprovider -k cuda "${kernels[@]}" "$root/tests/test_ops.py" \
  2>&1 | tee test.log | tail -n 5
tests=${PIPESTATUS[0]}
for tool in memcheck racecheck; do
  timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    python3 -m pytest -q -x -p no:cacheprovider -k "cuda and not hypothesis" "$root/tests/test_small_svd.py" \
    >"$tool.log" 2>&1
  echo "$tool: exit $? ($(tail -n 1 "$tool.log"))"
done
timeout 240 python3 -m pytest -q -p no:cacheprovider -k cuda "$root/bench" --benchmark-json=bench.json \
  2>&1 | tee bench.log | tail -n 60
exit "$tests"
