"""One call of the GPU check: `python -m gpu correct|anchors|ours|why|sanitize [--dry]`, from
bench/.

Runs the steps of the call that are not in the results yet, one after the other, in a worker
process; ends before its time is over and says what is left. Exit code: 0 where all is done, 1 where
a step failed, 2 where one is left for another call.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from . import build, calls
from .machine import ROOT, describe_machine
from .results import FINISHED, finished_steps, pack_results, read_lines
from .steps import Bench

BUDGET = 465.0
"""Seconds of a call's steps. They expect two thirds of it, since no card has confirmed them yet."""
LOAN = 570.0
"""Seconds of a call with the build before it. A machine is lent for ten minutes at a time."""
FAILED, INCOMPLETE = 1, 2
SEND = "Attach this file to an issue of the project."
GRACE = 8.0
"""A step may run over so many seconds before it is killed."""
WORKER = [sys.executable, "-m", "gpu.worker"]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    words = read_words(arguments)
    out = words.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends = set[int]()
    try:
        for call in words.calls or calls.CALLS:
            began = time.time()
            command = f"bench/gpu.sh {call}{' --dry' if words.dry else ''}"
            bench = Bench(call, out, describe_machine(), command, words.dry)
            if not words.dry:
                build.install(bench)
            deadline = min(time.time() + words.seconds, began + LOAN)
            ends.add(run_call(bench, deadline, words.known))
    finally:
        pack_logs(out)
        sent = pack_results(out)
    if sent:
        print(f"Results: {sent}. {SEND}", flush=True)
    return FAILED if FAILED in ends else max(ends, default=0)


def read_words(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calls", nargs="*", choices=[*calls.CALLS, []], help="default: all")
    parser.add_argument("--dry", action="store_true", default=bool(os.environ.get("DRY")))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "out")))
    parser.add_argument("--seconds", type=float, default=BUDGET, help="of each call")
    parser.add_argument(
        "--known",
        type=Path,
        default=ROOT / "bench" / "results" / "gpu.jsonl",
        help="results of earlier runs, beside those in --out",
    )
    return parser.parse_args(arguments)


def run_call(bench: Bench, deadline: float, known: Path) -> int:
    """Runs what is missing of a call; FAILED where a step did, INCOMPLETE where one is left."""
    lines = read_lines([known, bench.results])
    same = (bench.call, bench.machine["card"], bench.machine["sources"])
    done = finished_steps(lines, *same)
    names = [step.name for step in calls.list_steps(bench)]
    todo = [name for name in names if name not in done]
    print(f"== {bench.call}: {len(todo)} of {len(names)} steps are to be done", flush=True)
    waiting = list(todo)
    while waiting and time.time() < deadline:
        begun, hung = run_worker(bench, waiting, deadline)
        if hung:
            bench.step = hung
            bench.record(FINISHED, None, "s", error="its process ended, it hung, or time was over")
        # What was not begun had too little time; what comes after a lost GPU gets a new process.
        rest = [name for name in waiting if name not in begun]
        if rest == waiting or not begun or waiting[-1] in begun:
            break
        waiting = waiting[waiting.index(begun[-1]) + 1 :]
    lines = read_lines([known, bench.results])
    left = [name for name in names if name not in finished_steps(lines, *same)]
    errors = {
        line["step"]: line["error"]
        for line in lines
        if line["name"] == FINISHED and "error" in line
    }
    failed = [name for name in left if name in errors and name in todo]
    for name in failed:
        print(f"FAILED {bench.call}/{name}: {errors[name]}")
    missed = [name for name in left if name not in failed]
    if missed:
        print(f"left for another call of `{bench.command}`: {', '.join(missed)}")
    print(f"== {bench.call}: {len(names) - len(left)} of {len(names)} steps are done", flush=True)
    return FAILED if failed else INCOMPLETE if missed else 0


def run_worker(bench: Bench, names: list[str], deadline: float) -> tuple[list[str], str]:
    """Runs steps in a process of their own until it ends, or is killed at the deadline."""
    process = subprocess.Popen(
        [*WORKER, write_order(bench, names, deadline)],
        cwd=ROOT / "bench",
        stdout=subprocess.PIPE,
        text=True,
    )
    next_line = listen(process)
    expected = {step.name: step.seconds for step in calls.list_steps(bench)}
    begun: list[str] = []
    running, limit = "", deadline + GRACE
    while True:
        try:
            line = next_line(max(0.1, limit - time.time()))
        except queue.Empty:
            process.kill()
            process.wait()
            return begun, running
        if line is None:
            if process.wait() and not begun:
                return begun, names[0]
            return begun, running  # a step that was running has ended the process
        word, _, name = line.strip().partition(" ")
        if word == "BEGIN":
            begun.append(name)
            running, limit = name, min(deadline + GRACE, time.time() + 3 * expected[name] + GRACE)
        elif word == "END":
            running, limit = "", deadline + GRACE
        else:
            print(line, end="", flush=True)


def write_order(bench: Bench, names: list[str], deadline: float) -> str:
    """What a worker is told, as JSON."""
    order = {"call": bench.call, "out": str(bench.out), "machine": bench.machine}
    order |= {"command": bench.command, "dry": bench.dry, "steps": names, "deadline": deadline}
    return json.dumps(order)


def listen(process: subprocess.Popen[str]) -> Callable[[float], str | None]:
    """A function that waits some seconds for the next line: None at the end, or queue.Empty."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lambda seconds: lines.get(timeout=seconds)


def pack_logs(out: Path) -> None:
    """All logs as one file, since few files come back from some machines."""
    logs = out.with_name(f"{out.name}-logs")
    if logs.exists():
        with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
            archive.add(logs, "logs")


if __name__ == "__main__":
    build.enter_environment()
    sys.exit(main())
