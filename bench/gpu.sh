#!/usr/bin/env bash
# The whole GPU check in one command and under ten minutes, for a machine with a card and without
# network (Python 3.12, torch with CUDA, cupy-cuda13x, nvcc 13, scikit-build-core, pybind11, pytest,
# pytest-benchmark, hypothesis): builds for the card, lists the kernels' registers and spills, runs
# the cuda tests, compute-sanitizer over the small ones, and the benches against their named
# baselines. Results go to $OUT (default: out/): logs and JSON, with card, date and commit. What is
# missing is said and left out. Exit code: that of the tests, or of the sanitizer if those pass.
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
  python3 -c 'import cupy; print("cupy", cupy.__version__)' 2>/dev/null || echo "cupy: not installed"
} | tee "$OUT/machine.txt"

python3 -m pip install -q --no-index --no-build-isolation --no-deps . \
  -Ccmake.define.PROLORA_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native \
  >"$OUT/build.log" 2>&1 || { tail -n 30 "$OUT/build.log"; exit 1; }

# Outside the tree, so that the installed package is the one under test.
cd "$OUT"
python3 -m prolora info
if command -v cuobjdump >/dev/null; then
  cuobjdump --dump-resource-usage "$(python3 -c 'import prolora.core._C as c; print(c.__file__)')" \
    >resources.txt 2>&1
  echo "registers, shared memory and spills: resources.txt"
else
  echo "cuobjdump: not installed, no table of registers"
fi
export PROLORA_REQUIRE=cpu,cuda
timeout 100 python3 -m pytest -q -p no:cacheprovider -k cuda "$root/tests/core/ops" \
  2>&1 | tee test.log | tail -n 5
status=${PIPESTATUS[0]}
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m pytest -q -x -p no:cacheprovider -k "cuda and not hypothesis" "$root/tests/core/ops/test_small_svd.py" \
      >"$tool.log" 2>&1
    found=$?
    echo "$tool: exit $found ($(tail -n 1 "$tool.log"))"
    [ "$status" -eq 0 ] && status=$found
  done
else
  echo "compute-sanitizer: not installed"
fi
# torch.linalg.svd over 64 x 1280² alone takes most of a minute on some cards: the cases that fit
# come first, and what is cut off is missing from the JSON rather than guessed.
timeout 80 python3 -m pytest -q -p no:cacheprovider -k cuda "$root/bench/test_ops.py" \
  --benchmark-max-time=0.2 --benchmark-json=ops.json 2>&1 | tee ops.log | tail -n 40
for case in 0 1 4 5 2 3; do
  timeout 45 python3 -m pytest -q -p no:cacheprovider "$root/bench/test_svd.py" -k "cuda and $case" \
    --benchmark-json="svd_$case.json" 2>&1 | tee "svd_$case.log" | tail -n 4
done
exit "$status"
