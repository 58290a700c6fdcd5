"""Builds and installs the package for the card that is here, once for the same sources."""

from __future__ import annotations

import sys
import time
from importlib import metadata
from pathlib import Path

from .steps import Bench


def install(bench: Bench) -> None:
    """Records the seconds; the output is in the logs."""
    marker = Path(sys.prefix) / "prolora-sources.txt"
    sources = bench.machine["sources"]
    if _is_installed() and marker.exists() and marker.read_text() == sources:
        return
    bench.step = "build"
    began = time.perf_counter()
    code, text = bench.run_command(
        "build.txt",
        *(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation"),
        *("--no-deps", ".", "-Ccmake.define.PROLORA_CUDA=ON", "-Ccmake.define.PROLORA_NATIVE=ON"),
        "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native",
        seconds=400,
    )
    if code:
        print(text[-3000:])
        raise SystemExit("the build failed")
    marker.write_text(sources)
    bench.record("build", time.perf_counter() - began, "s")


def _is_installed() -> bool:
    try:
        return bool(metadata.version("prolora"))
    except metadata.PackageNotFoundError:
        return False
