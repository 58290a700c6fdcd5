"""Runs steps of a call in a process of its own: `python -m gpu.worker JSON`, from bench/.

A GPU that has failed once (an illegal address) fails until the process ends, and a call that hangs
can only be killed. Says BEGIN and END of each step, so that __main__.py knows which one it was.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

from . import calls
from .results import FINISHED
from .steps import Bench, has_tool

GPU_IS_LOST = 3


def main() -> int:
    """Exit code GPU_IS_LOST where later steps need a new process."""
    order = json.loads(sys.argv[1])
    bench = Bench(
        order["call"], Path(order["out"]), order["machine"], order["command"], order["dry"]
    )
    steps = {step.name: step for step in calls.list_steps(bench)}
    for name in order["steps"]:
        step = steps[name]
        if time.time() + (0 if bench.dry else step.seconds) > order["deadline"]:
            continue
        print(f"BEGIN {name}", flush=True)
        began, bench.step = time.perf_counter(), name
        try:
            if not has_tool(step.tool):
                raise FileNotFoundError(f"{step.tool} is not installed")
            step.run(bench)
        except Exception as error:
            (bench.logs / f"{bench.call}-{name}.txt").write_text(traceback.format_exc())
            message = f"{type(error).__name__}: {error}"[:300]
            bench.record(FINISHED, None, "s", error=message)
            print(f"END {name}", flush=True)
            if "CUDA error" in message:
                return GPU_IS_LOST
            continue
        bench.record(FINISHED, time.perf_counter() - began, "s")
        print(f"END {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
