"""Call 4: where the time goes, a whole transfer from file to file, and a step of a fit."""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import prolora
from prolora.fitting.models import frozen, in_precision
from prolora.fitting.settings import BFLOAT16
from prolora.fitting.solver.joint_fit import fit_jointly
from prolora.fitting.swapping import BlockSwapping

from .clock import peak_memory
from .machine import ROOT
from .one_kernel import OPS
from .steps import Bench, Step, make_weights

METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "share of the SMs' peak",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "share of the memory's peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}


def list_steps(bench: Bench) -> Iterator[Step]:
    """The profile of the goals' case, the kernels, then the whole."""
    yield Step("profile", 30, profile)
    yield Step("sdxl to ssd-1b", 140, transfer_whole)
    yield Step("fit step", 40, fit_step)
    for op in OPS[: 1 if bench.dry else None]:
        tool = "" if bench.dry else "ncu"
        yield Step(f"ncu {op}", 16, partial(run_ncu, op=op), tool=tool)


def profile(bench: Bench) -> None:
    """A trace among the logs, and the ten operators that take most of the device's time."""
    w = make_weights(bench.batch(64), bench.size(1280), bench.size(1280), bench.device)
    rank = bench.size(128)
    prolora.truncated_svd(w, rank)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        prolora.truncated_svd(w, rank)
        if bench.device == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(bench.logs / "trace.json"))
    where = "self_device_time_total" if bench.device == "cuda" else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, where, 0))
    for row in rows[:10]:
        case = f"64 x 1280x1280, k=128: {row.key[:60]}"
        bench.record("profile", getattr(row, where, 0) / 1e3, "ms", case, repeats=max(1, row.count))


def run_ncu(bench: Bench, op: str) -> None:
    """What ncu measures of each launch; without it, that the script runs."""
    large = () if bench.dry else ("large",)
    script = (sys.executable, "-m", "gpu.one_kernel", op, bench.device, *large)
    # Without a word on them ncu locks the clocks of the card.
    watch = ("ncu", "--clock-control", "none", "--launch-count", "40")
    # Torch makes the operands, and so runs kernels of its own libraries first.
    watch += ("--kernel-name-base", "demangled", "--kernel-name", "regex:prolora")
    watch += ("--csv", "--metrics", ",".join(METRICS))
    code, text = bench.run_command(
        f"ncu-{op}.txt", *(() if bench.dry else watch), *script, seconds=90, cwd=ROOT / "bench"
    )
    assert code == 0, text[-300:]
    for name, metric, value, unit in parse_ncu(text):
        bench.record(f"ncu {METRICS[metric]}", value, unit, f"{op}: {name}")


def parse_ncu(text: str) -> Iterator[tuple[str, str, float, str]]:
    """(kernel, metric, value, unit) of `ncu --csv`."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    for row in csv.DictReader(lines[starts[0] :]) if starts else ():
        if row.get("Metric Name") in METRICS:
            value = float(row["Metric Value"].replace(",", ""))
            yield row["Kernel Name"][:80], row["Metric Name"], value, row["Metric Unit"]


def transfer_whole(bench: Bench) -> None:
    """SDXL's LoRA to SSD-1B; at toy size, between the small models that come with the package."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if bench.dry:
            models = ROOT / "examples" / "mini_family" / "weights"
            paths = [models / "loras" / "thick.safetensors", models / "source", models / "pruned"]
        else:
            import sdxl

            paths = sdxl.write_all(root)
        for rank, attempt in ((128, "first"), (128, "again"), (0.9, "first")):
            begun = time.perf_counter()
            report = prolora.transfer(
                *paths,
                out=root / "out.safetensors",
                rank=min(rank, 8) if bench.dry else rank,
                method="prolora",
                device=bench.device,
                overwrite=True,
                cache=root / f"cache-{rank}-{attempt}",
            ).report
            case = f"560 modules, rank {rank}, {attempt} in this process"
            seconds = time.perf_counter() - begun
            bench.record("transfer_file", seconds, "s", case)
            for stage, spent in report.seconds.items():
                bench.record(f"transfer_file, {stage}", spent, "s", case)


def fit_step(bench: Bench) -> None:
    """One Gauss–Newton step at SDXL's width in bfloat16, half of its blocks off the card."""
    import fit_memory

    model = fit_memory.build("sd15" if bench.dry else "sdxl", 32)
    names = fit_memory.list_names(model)
    with torch.device(bench.device):
        call = fit_memory.make_call(model, 1, 64 if bench.dry else 1024)
    swapping = BlockSwapping(model, bench.device)
    swapping.keep(sum(swapping.sizes.values()) // 2)
    assert swapping.away and len(swapping.away) < len(swapping.blocks)
    with frozen(model), in_precision(model, BFLOAT16):
        problem = fit_memory.make_problem(model, names, call, 1, 8)
        begun, fits = time.perf_counter(), []
        peak = peak_memory(lambda: fits.append(fit_jointly(problem)), bench.device)
    case = f"{len(names)} modules, {len(swapping.away)} of {len(swapping.blocks)} blocks away"
    bench.record("fit step", time.perf_counter() - begun, "s", case)
    bench.record("fit step, peak memory", peak / 2**20, "MiB", case)
    bench.require("fit step, share of the loss left", fits[0].history[-1], 1.0, "", case)
