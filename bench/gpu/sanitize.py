"""Call 5: are the kernels sound? compute-sanitizer over each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from .machine import ROOT
from .one_kernel import OPS
from .steps import Bench, Step


def list_steps(bench: Bench) -> Iterator[Step]:
    """All kernels by one tool, then by the other."""
    needed = "" if bench.dry else "compute-sanitizer"
    for tool in ("memcheck", "racecheck"):
        for op in OPS[: 1 if bench.dry else None]:
            yield Step(f"{tool} {op}", 25, partial(sanitize, op=op, tool=tool), tool=needed)


def sanitize(bench: Bench, op: str, tool: str) -> None:
    """One kernel under a tool; at toy size the script that it would watch.

    Calls by which torch asks what a card can do fail by design, and are no errors of a kernel.
    """
    script = (sys.executable, "-m", "gpu.one_kernel", op, bench.device)
    watch = () if bench.dry else ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    if watch and tool == "memcheck":
        watch += ("--report-api-errors", "no")
    if bench.dry and tool == "racecheck":
        return
    code, text = bench.run_command(
        f"{tool}-{op}.txt", *watch, *script, seconds=100, cwd=ROOT / "bench"
    )
    bench.record(f"exit code of {tool}", code, "", op)
    assert code == 0, text[-300:]
