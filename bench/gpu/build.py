"""Builds and installs the package for the card that is here, once for the same sources.

Debian's and Ubuntu's own Python refuses pip, so the check runs in an environment beside the
sources, which sees the packages of the Python that made it (`enter_environment`).
"""

from __future__ import annotations

import os
import sys
import sysconfig
import time
import venv
from importlib import metadata
from pathlib import Path

from .machine import ROOT
from .steps import Bench

ENVIRONMENT = ROOT / "build" / "gpu-environment"
BUILD_SECONDS = 400


def enter_environment() -> None:
    """Starts the check again in an environment, where this Python's packages are the system's."""
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    if sys.prefix != sys.base_prefix or not managed:
        return
    venv.create(ENVIRONMENT, system_site_packages=True, with_pip=True)
    python = str(ENVIRONMENT / "bin" / "python")
    os.execv(python, [python, "-m", "gpu", *sys.argv[1:]])


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
        seconds=BUILD_SECONDS,
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
