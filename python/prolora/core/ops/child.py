"""A child process for the first run of kernels on a card.

A kernel that reads a wrong address leaves its process without a GPU, and so must not run first in
the caller's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SECONDS = 120.0
"""A child that takes longer hangs. It starts in 3 to 10 s."""

_PROGRAM = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
importlib.import_module(sys.argv[2]).run_child(*sys.argv[3:])
"""


def command() -> list[str]:
    """Returns the command line of a child, without its arguments; [] where nothing starts one.

    An application that brings its own interpreter would start itself again.
    """
    if not Path(sys.executable or "").stem.lower().startswith(("python", "pypy")):
        return []
    module = f"{__name__.rpartition('.')[0]}.probe"
    return [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), module]


def probe_ops(device: str) -> tuple[dict[str, str], bool]:
    """Runs the kernels of all ops in child processes.

    Returns for each op that ran "" or why it fails; and whether all ran: without memory or a child
    they do not.
    """
    results, lacked = dict[str, str](), set[str]()
    while line := command():
        words = [*line, device, *results, *lacked]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=SECONDS, check=False
            )
            output, code, why = done.stdout, done.returncode, done.stderr.strip()[-200:]
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or ""
            output = printed.decode() if isinstance(printed, bytes) else printed
            code, why = 1, f"it takes more than {SECONDS:.0f} s"
        except OSError:
            break
        running = ""
        for event, _, rest in (line.partition(" ") for line in output.splitlines()):
            op, _, message = rest.partition(" ")
            running = op if event == "BEGIN" else ""
            if event == "END" and lacks_memory(message):
                lacked.add(op)
            elif event == "END":
                results[op] = message
        if code == 0:
            return results, not lacked
        if not running or lacks_memory(why):
            break  # no child of this kind gets anywhere
        results[running] = f"exit code {code}: {why}"
    return results, False


def lacks_memory(message: str) -> bool:
    """Returns whether an error message of torch or CUDA is about memory."""
    words = message.lower()
    return any(part in words for part in ("out of memory", "alloc_failed", "bad_alloc"))
