"""Counts what truncated_svd asks of a GPU, on the CPU: `python bench/dispatches.py OUT LABEL`.

Dispatches, host synchronisations, flops and bytes of each stage, on generated weights. The chunks
are those of a GPU, and so are the solvers. OUT is a JSON file that keeps the counts under LABEL;
those under other labels stay.

What the CPU cannot count: the kernels that LAPACK's counterparts launch, and the copies between
host and device. They are in bench/gpu_model.py's figures as estimates.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu.counters import Tally, counting
from gpu.machine import find_commit
from gpu.one_kernel import by_kernels
from gpu.stages import stage_of
from gpu.steps import make_weights

import prolora
from prolora.core.svd import krylov, stacks

STACKS = [(64, 1280, 1280, 128), (8, 3072, 3072, 128), (64, 1280, 1280, 0.99)]
"""The stacks that the goals are about: (matrices, rows, columns, rank)."""
HEADLINES = [(b, *size) for most, *size in STACKS for b in (2, most)]
IN_16_BITS = [case for case in HEADLINES if case[-1] == 128]
# The other shapes of SDXL and FLUX.1, for the model of a whole base.
MODELS = [
    *((2, m, n, 128) for m, n in ((640, 640), (1280, 2048), (640, 2048), (10240, 1280))),
    *((2, m, n, 128) for m, n in ((1280, 5120), (5120, 640), (640, 2560))),
    *((2, m, n, 128) for m, n in ((12288, 3072), (3072, 12288), (3072, 15360))),
    *((2, m, n, 0.9) for m, n in ((1280, 1280), (640, 640), (1280, 2048), (640, 2048))),
]
LABELS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "after": (HEADLINES, {}),
    "models": (MODELS, {}),
    "models, slow float64": (MODELS, {"slow_float64": True}),
    "stored": (IN_16_BITS, {"stored": "torch"}),
    "krylov_block": (IN_16_BITS, {"stored": "krylov_block"}),
}
"""Label -> what is counted: stacks, on what card, and by what they are multiplied in 16 bits."""


@contextmanager
def as_on_a_gpu(slow_float64: bool = False) -> Any:
    """The chunks and solvers that a GPU would get, on the CPU."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(stacks, "FORCE_BATCHED", True))
        if slow_float64:
            cost = stacks.SLOW_FLOAT64_COST
            stack.enter_context(mock.patch.object(krylov, "float64_cost", lambda _: cost))
        yield


def count_case(
    b: int, m: int, n: int, rank: int | float, slow_float64: bool = False, stored: str = ""
) -> dict[str, Any]:
    """The counts for one stack."""
    weights = make_weights(b, m, n, "cpu").to(torch.bfloat16 if stored else torch.float32)
    asked = by_kernels() if stored == "krylov_block" else nullcontext()
    began = time.perf_counter()
    with asked, as_on_a_gpu(slow_float64), counting(stage_of) as tally:
        result = prolora.truncated_svd(weights, rank)
    return {
        "matrices": b,
        "rows": m,
        "columns": n,
        "rank": rank,
        "solver": result.solver,
        "columns kept": int(result.rank.max()),
        "seconds on the CPU": round(time.perf_counter() - began, 1),
        **summarise(tally),
    }


def summarise(tally: Tally) -> dict[str, Any]:
    """The totals, by stage, and the calls themselves for the model of their time."""
    stages: dict[str, dict[str, int]] = {}
    for call, count in tally.calls.items():
        stage = stages.setdefault(call.stage, Counter())
        stage["dispatches"] += count * (call.kind != "view")
        stage[f"{call.dtype} flops"] += count * call.flops
        stage["bytes"] += count * call.bytes
    for stage, waits in tally.waits.items():
        stages.setdefault(stage, Counter())["synchronisations"] += waits
    return {
        "dispatches": tally.dispatches,
        "synchronisations": sum(tally.waits.values()),
        "float32 flops": tally.flops("float32"),
        "float64 flops": tally.flops("float64"),
        "bytes": tally.bytes,
        "factorisations": tally.factorisations(),
        "stages": {
            name: {what: n for what, n in stage.items() if n} for name, stage in stages.items()
        },
        "calls": _calls(tally),
    }


def _calls(tally: Tally) -> list[list[Any]]:
    """[stage, op, kind, dtype, shape, flops, bytes, count]; passes of a stage are summed up."""
    rows: list[list[Any]] = []
    passes: dict[str, list[int]] = {}
    for call, count in tally.calls.items():
        if call.kind == "pass":
            known = passes.setdefault(call.stage, [0, 0])
            known[0] += count * call.bytes
            known[1] += count
        elif call.kind != "view":
            shape = list(call.shape)
            rows.append(
                [call.stage, call.op, call.kind, call.dtype, shape, call.flops, call.bytes, count]
            )
    for stage, (moved, count) in passes.items():
        rows.append([stage, "passes", "pass", "", [], 0, moved // count, count])
    return rows


def _format(known: dict[str, Any]) -> str:
    """JSON with a line for each call."""
    return re.sub(r"\n {6,}\s*", "", json.dumps(known, indent=1)) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("label", choices=LABELS)
    words = parser.parse_args()
    torch.set_num_threads(1)  # the stack stays in this thread, where it is counted
    stacks, options = LABELS[words.label]
    cases = []
    for stack in stacks:
        cases.append(count_case(*stack, **options))
        summary = {k: v for k, v in cases[-1].items() if k not in ("calls", "stages")}
        print(json.dumps(summary), flush=True)
        known = json.loads(words.out.read_text()) if words.out.exists() else {}
        known[words.label] = {"commit": find_commit(), "torch": torch.__version__, "cases": cases}
        words.out.write_text(_format(known))


if __name__ == "__main__":
    main()
