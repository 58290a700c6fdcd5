"""Resumable work: each job makes one file, and any number of processes may help.

A job runs when the files it needs exist. It is claimed by a lock file that names the process, so
that a second process takes another job and a lock left by a dead process is taken over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One file to make."""

    path: Path  # the file
    needs: tuple[Path, ...]  # files that must exist before
    run: Callable[[Path], None]  # writes the file's content to the path it is given


def run_jobs(jobs: Sequence[Job]) -> None:
    """Runs jobs in order until every file exists or nothing is left that this process can do."""
    while missing := [job for job in jobs if not job.path.exists()]:
        ready = [job for job in missing if all(path.exists() for path in job.needs)]
        job = next((job for job in ready if _claim(job.path)), None)
        if job is None:
            time.sleep(2)  # others are at work on what is missing
            continue
        started = time.monotonic()
        part = job.path.with_suffix(".part")
        try:
            job.run(part)
            part.rename(job.path)
        finally:
            part.unlink(missing_ok=True)
            _lock(job.path).unlink(missing_ok=True)
        left = sum(not job.path.exists() for job in jobs)
        print(f"{job.path.name}: {time.monotonic() - started:.0f} s, {left} left", flush=True)


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")


def _claim(path: Path) -> bool:
    """Takes the lock of a job, also from a process that is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    for _ in range(2):
        try:
            with lock.open("x") as file:
                file.write(str(os.getpid()))
            return not path.exists()
        except FileExistsError:
            try:
                os.kill(int(lock.read_text()), 0)
            except (ProcessLookupError, FileNotFoundError, ValueError):
                lock.unlink(missing_ok=True)
            else:
                return False
    return False
