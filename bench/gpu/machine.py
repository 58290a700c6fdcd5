"""What a number depends on beside the code that was timed: card, date, sources."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc", "python/prolora", "CMakeLists.txt", "cmake")


def describe_machine() -> dict[str, str]:
    """The fields card, date, commit, versions and sources of a line."""
    return {
        "card": find_card(),
        "date": date.today().isoformat(),
        "commit": find_commit(),
        "versions": find_versions(),
        "sources": hash_sources(),
    }


def find_card() -> str:
    """The name of the first GPU, or of the processor where there is none."""
    names = _ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return names.splitlines()[0] if names else f"no GPU ({platform.machine()})"


def find_commit() -> str:
    """As git describes it, or as COMMIT says in a copy without its history."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    return _ask("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"


def find_versions() -> str:
    """Of torch, its CUDA and the driver; "none" for what is not there."""
    driver = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    parts = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "driver": driver.splitlines()[0] if driver else None,
    }
    return ", ".join(f"{name} {version or 'none'}" for name, version in parts.items())


def hash_sources() -> str:
    """Of everything that is built or installed."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.suffix in (".py", ".h", ".cpp", ".cu", ".txt", ".cmake") and file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
