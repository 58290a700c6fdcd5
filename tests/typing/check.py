"""Type checkers read tests/typing/caller.py: what must be found, and nothing else, is found.

    python tests/typing/check.py [--python PYTHON] [mypy|pyright]

Checks the prolora that a Python imports: the one it runs in, unless another is given. Each checker
must be installed in the one it runs in.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CALLER = Path(__file__).with_name("caller.py")
SETTINGS = Path(__file__).parents[2] / "pyproject.toml"


def list_mistakes() -> set[int]:
    """The lines that are marked."""
    lines = CALLER.read_text("utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("# mistake")}


def ask_mypy(python: str) -> set[int]:
    """The lines in which mypy finds errors."""
    with tempfile.TemporaryDirectory() as cache:
        words = ["-m", "mypy", "--strict", "--no-error-summary", "--python-executable", python]
        if known := os.environ.get("MYPY_CACHE_DIR"):
            # What mypy read of torch with our settings serves those alone, and saves a minute.
            words += ["--cache-dir", known, "--config-file", str(SETTINGS)]
        else:
            words += ["--cache-dir", cache]
        run = subprocess.run(
            [sys.executable, *words, str(CALLER)],
            cwd=cache,
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.findall(rf"{re.escape(CALLER.name)}:(\d+): error", run.stdout)
    if run.returncode > 1 or (run.returncode and not found):
        raise SystemExit(run.stdout + run.stderr)
    return {int(number) for number in found}


def ask_pyright(python: str) -> set[int]:
    """The lines in which pyright finds errors, by its strict rules."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / CALLER.name
        copy.write_text("# pyright: strict\n" + CALLER.read_text("utf-8"), "utf-8")
        words = ["-m", "pyright", "--outputjson", "--pythonpath", python, str(copy)]
        run = subprocess.run(
            [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False
        )
    try:
        told = json.loads(run.stdout)["generalDiagnostics"]
    except ValueError:
        raise SystemExit(run.stdout + run.stderr) from None
    # The first line is ours, and lines count from 0.
    return {one["range"]["start"]["line"] for one in told if one["severity"] == "error"}


def main() -> int:
    """Asks the checkers; 1 if one of them misses a mistake or makes one up."""
    asks = {"mypy": ask_mypy, "pyright": ask_pyright}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("checkers", nargs="*", metavar="|".join(asks))
    asked = parser.parse_args()
    wanted, bad = list_mistakes(), 0
    lines = CALLER.read_text("utf-8").splitlines()
    for name in asked.checkers or list(asks):
        found = asks[name](asked.python)
        print(f"{name}: {len(found & wanted)} of {len(wanted)} mistakes found, ", end="")
        print(f"{len(found - wanted)} made up")
        for number in sorted(found ^ wanted):
            what = "made up" if number in found else "missed"
            print(f"  {what}: {CALLER.name}:{number} {lines[number - 1]}")
            bad = 1
    return bad


if __name__ == "__main__":
    sys.exit(main())
