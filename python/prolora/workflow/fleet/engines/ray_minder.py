"""Ends what a killed driver leaves of the Ray that it started.

Ray's own processes end with the driver, but for two agents of the node: they notice that the node
is gone, and then try for a minute to tell a head that is gone, too. A process that waits for the
end of the driver ends them at once. It is this file, run alone, so that it takes little memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PROCESSES = "/proc"


def list_descendants(process: int) -> dict[int, str]:
    """The processes below one, and when each began; none where the system does not list them."""
    parents: dict[int, int] = {}
    began: dict[int, str] = {}
    for name in os.listdir(_PROCESSES) if os.path.isdir(_PROCESSES) else ():
        if name.isdigit() and (found := _read_process(int(name))):
            parents[int(name)], began[int(name)] = found
    below: dict[int, str] = {}
    waiting = [process]
    while waiting:
        above = waiting.pop()
        children = [child for child, parent in parents.items() if parent == above]
        below |= {child: began[child] for child in children}
        waiting += children
    return below


def _read_process(process: int) -> tuple[int, str] | None:
    """The parent of a process and when it began, which tells it from a later one of its number."""
    try:
        with open(f"{_PROCESSES}/{process}/stat", encoding="utf-8", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
        return int(words[1]), words[19]
    except (OSError, IndexError, ValueError):
        return None


@contextmanager
def mind_processes(processes: dict[int, str]) -> Iterator[None]:
    """Sees to it that processes end with this one, however it ends, or with the body.

    Args:
        processes: number -> when it began.
    """
    command = [sys.executable, "-I", "-S", __file__]
    minder = None
    with suppress(OSError):
        # In a session of its own, so that Ctrl-C does not reach it.
        minder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
    try:
        if minder is not None and minder.stdin is not None:
            minder.stdin.write("".join(f"{p} {b}\n" for p, b in processes.items()).encode())
            minder.stdin.flush()
        yield
    finally:
        if minder is not None:
            with suppress(OSError, subprocess.TimeoutExpired):
                minder.communicate(timeout=5)


def _main() -> None:
    """Waits until nobody can write to standard input any more."""
    for line in sys.stdin.read().splitlines():
        number, began = line.split()
        found = _read_process(int(number))
        if found and found[1] == began:
            with suppress(OSError):
                os.kill(int(number), signal.SIGKILL)


if __name__ == "__main__":
    _main()
