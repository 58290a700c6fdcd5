"""Programs in processes that have imported torch alone, and commands without a process."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

# Importing torch takes most of a start: done once, and each program runs in a fork.
_FORKS = """
import json, os, sys, traceback
import torch
for code, environment in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        os.environ.update(environment)
        os.dup2(1, 2)
        failed = 0
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            failed = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(failed)
    ended = os.waitpid(child, 0)[1]
    print(f"\\0{ended}\\0", end="", flush=True)
"""


def run_fresh(programs: Sequence[tuple[str, Mapping[str, str]]]) -> list[tuple[int, str]]:
    """(0 where it ended well, output and errors) of programs, each with its environment."""
    if not hasattr(os, "fork"):
        return [_start(["-c", code], environment) for code, environment in programs]
    ended, said = _start(["-c", _FORKS, json.dumps([(code, dict(e)) for code, e in programs])], {})
    assert ended == 0, said
    parts = said.split("\0")
    return list(zip(map(int, parts[1::2]), parts[:-1:2], strict=True))


def _start(words: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.returncode, run.stdout


def run_here(command: str) -> list[str]:
    """Runs a command `python -c CODE ARGUMENT...` in this process; its arguments."""
    python, option, code, *arguments = shlex.split(command)
    assert (python, option) == ("python", "-c")
    before, sys.argv = sys.argv, [option, *arguments]
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        sys.argv = before
    return arguments
