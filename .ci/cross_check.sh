#!/usr/bin/env bash
# Compiles the host C++ for machines that CI does not have, by the clang of the ziglang package:
# Windows, macOS and Linux on ARM, once with OpenMP. Nothing is linked and nothing is run:
# this finds what another compiler or standard library does not accept, and no more than that (for
# which nothing needs to be optimised).
# MSVC is not among them.
#
#   pip install ziglang pybind11 && .ci/cross_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ZIG_GLOBAL_CACHE_DIR="$work/cache" ZIG_LOCAL_CACHE_DIR="$work/cache"

python_headers=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
pybind11_headers=$(python3 -c 'import pybind11; print(pybind11.get_include())')
# The headers of this machine's Python, with the sizes of Windows in place of its own.
cp -r "$python_headers" "$work/python-windows"
cp .ci/windows/pyconfig.h "$work/python-windows/"

check() {
  local target=$1 headers=$2 source=$3
  shift 3
  echo "$target $source $*"
  python3 -m ziglang c++ -target "$target" -std=c++17 -O0 -Wall -Wextra -Werror "$@" \
    -DPROLORA_INTERFACE='"of no build"' -Icsrc -isystem "$headers" -isystem "$pybind11_headers" -c "$source" -o "$work/out.o"
}

for target in x86_64-windows-gnu aarch64-macos aarch64-linux-gnu; do
  headers=$python_headers
  if [ "$target" = x86_64-windows-gnu ]; then headers=$work/python-windows; fi
  check "$target" "$headers" csrc/cpu.cpp
  check "$target" "$headers" csrc/bind.cpp
done
check x86_64-windows-gnu "$work/python-windows" csrc/cpu.cpp -fopenmp
# The emulator's fibers: assembly for both kinds of processor, ucontext elsewhere.
for target in aarch64-macos aarch64-linux-gnu; do
  check "$target" "$python_headers" tests/emulator/fiber.cpp
done
check aarch64-linux-gnu "$python_headers" tests/emulator/fiber.cpp -DEMULATOR_UCONTEXT
echo "compiled for every target; nothing was run there"
