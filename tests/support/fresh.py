"""Programs in processes that have imported torch alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch

# Importing torch takes most of a start: done once, and each program runs in a fork.
_FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, arguments, environment, said = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = arguments
        failed = 0
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            failed = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(failed)
    print(os.waitpid(child, 0)[1], flush=True)
"""

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")


def start_fork(work: Callable[[], object]) -> int:
    """Starts a process that does some work and ends with 0, or with 1 if that fails; its id.

    One that hangs is ended by its alarm, so that nobody waits for it for ever.
    """
    process = os.fork()
    if not process:
        signal.alarm(120)
        torch.set_num_threads(1)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return process


@cache
def _start_forks() -> subprocess.Popen[str]:
    line = [sys.executable, "-c", _FORKS]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def try_fresh(code: str, *arguments: object, **environment: str) -> tuple[int, str]:
    """(0 where it ended well, output and errors) of a program."""
    words, env = list(map(str, arguments)), os.environ | environment
    if not hasattr(os, "fork"):
        line = [sys.executable, "-c", code, *words]
        run = subprocess.run(line, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True)
        return run.returncode, run.stdout
    forks = _start_forks()
    assert forks.stdin and forks.stdout
    with TemporaryDirectory() as folder:
        said = os.path.join(folder, "said")
        print(json.dumps([code, words, env, said]), file=forks.stdin, flush=True)
        ended = int(forks.stdout.readline())
        with open(said, encoding="utf-8") as file:
            return ended, file.read()


def run_fresh(code: str, *arguments: object, **environment: str) -> str:
    """Output and errors of a program that must end well."""
    ended, said = try_fresh(code, *arguments, **environment)
    assert ended == 0, said
    return said
