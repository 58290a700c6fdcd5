"""A 560-module SDXL LoRA onto SSD-1B at full size: wall time, share of the SVD, peak memory.

    python bench/sdxl_to_ssd1b.py FOLDER [--rank 0.9] [--threads 2] [--baseline-every 8] [--second]
                                  [--out bench/results/sdxl_to_ssd1b.json]

FOLDER receives 2.9 GB of generated checkpoints (bench/sdxl.py) and keeps them for the next run.
prolora and the baseline run one after the other in processes of their own, so that each has a peak
of resident memory of its own. The baseline is what one would write without prolora, layer by layer:
`torch.linalg.svd` of both weights in float32 and the dense products of the four projectors. It is
the same work for every layer of a shape, so it may be sampled (`--baseline-every N` takes each N-th
pair of each shape) and scaled up; the result says how many pairs were really run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from timing import peak_gib
from torch import Tensor

import prolora
from prolora.moving.plan import make_plan


def fresh_output(folder: Path) -> Path:
    """Where a result goes; the one that is there would be kept."""
    (folder / "out.safetensors").unlink(missing_ok=True)
    return folder / "out.safetensors"


def ours(folder: Path, rank: int | float) -> dict[str, Any]:
    """The whole job through the public file-to-file call."""
    started, worked = time.perf_counter(), time.process_time()
    report = prolora.transfer(
        folder / "lora.safetensors",
        folder / "sdxl",
        folder / "ssd-1b",
        out=fresh_output(folder),
        rank=rank,
        method="prolora",
    ).report
    seconds = time.perf_counter() - started
    columns = [row.measures.columns_source for row in report.rows("mapped") if row.measures]
    return {
        "seconds": seconds,
        "processor seconds": time.process_time() - worked,
        "stages": report.seconds,
        "share of svd": report.seconds["svd"] / seconds,
        "peak resident GiB": peak_gib(),
        "totals": report.totals,
        "columns": [min(columns), max(columns)],
        "largest bound": max(r.measures.bound for r in report.rows("mapped") if r.measures),
    }


def automatic(folder: Path) -> dict[str, Any]:
    """The default: both bases looked at, then copied or damped, without any decomposition."""
    paths = [folder / name for name in ("lora.safetensors", "sdxl", "ssd-1b")]
    started = time.perf_counter()
    report = prolora.transfer(*paths, out=fresh_output(folder)).report
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "method": report.method,
        "stages": report.seconds,
        "peak resident GiB": peak_gib(),
    }


def second(folder: Path, rank: int | float) -> dict[str, Any]:
    """The same LoRA again, with the subspaces kept from the first time."""
    options = {"method": "prolora", "rank": rank, "cache": folder / f"cache-{rank}"}
    paths = [folder / name for name in ("lora.safetensors", "sdxl", "ssd-1b")]
    prolora.transfer(*paths, out=fresh_output(folder), **options)
    started = time.perf_counter()
    report = prolora.transfer(*paths, out=fresh_output(folder), **options).report
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in options["cache"].rglob("*.safetensors"))
    return {
        "seconds": seconds,
        "stages": report.seconds,
        "peak resident GiB": peak_gib(),
        "cache GiB": size / 2**30,
    }


def baseline(folder: Path, rank: int | float, every: int) -> dict[str, Any]:
    """Layer by layer: LAPACK's SVD in float32, dense projectors."""
    adapter = prolora.adapters.read_adapter(folder / "lora.safetensors")
    source, target = (prolora.open_base(folder / name) for name in ("sdxl", "ssd-1b"))
    seconds = {"svd": 0.0, "project": 0.0}
    processor = 0.0
    pairs = sampled = 0
    for group in make_plan(adapter, source, target).groups().values():
        chosen = group[::every]
        pairs, sampled = pairs + len(group), sampled + len(chosen)
        for pair in chosen:
            weight = len(group) / len(chosen)
            started, worked = time.perf_counter(), time.process_time()
            bases = [
                leading(base.read(name).float(), rank)
                for base, name in ((source, pair.source), (target, pair.target))
            ]
            middle = time.perf_counter()
            project_densely(adapter.updates[pair.source].dense(), *bases)
            seconds["svd"] += weight * (middle - started)
            seconds["project"] += weight * (time.perf_counter() - middle)
            processor += weight * (time.process_time() - worked)
    return {
        "seconds": sum(seconds.values()),
        "processor seconds": processor,
        "stages": seconds,
        "pairs": pairs,
        "pairs really run": sampled,
        "peak resident GiB": peak_gib(),
    }


def leading(weight: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """U [m, k] and V [n, k]."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    k = rank
    if isinstance(rank, float):
        k = int((s.square().cumsum(0) < rank * s.square().sum()).sum()) + 1
    return u[:, :k], vt[:k].mT


def project_densely(
    delta: Tensor, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]
) -> Tensor:
    """The paper's formula term by term, with the projectors as matrices."""
    (us, vs), (ut, vt) = source, target
    ps, qs, pt, qt = us @ us.mT, vs @ vs.mT, ut @ ut.mT, vt @ vt.mT
    one_m, one_n = torch.eye(len(ps)), torch.eye(len(qs))
    inside = ps @ delta @ qs
    outside = (one_m - ps) @ delta @ (one_n - qs)
    return pt @ inside @ qt + (one_m - pt) @ outside @ (one_n - qt)


def in_own_process(part: str, words: argparse.Namespace) -> dict[str, Any]:
    """Runs this script for one part and reads what it prints."""
    command = [sys.executable, __file__, str(words.folder), "--part", part, "--rank", words.rank]
    command += ["--threads", str(words.threads), "--baseline-every", str(words.baseline_every)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def commit() -> str:
    """The commit that was measured."""
    line = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True).stdout.strip()


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", default="0.9")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--baseline-every", type=int, default=8)
    parser.add_argument("--second", action="store_true", help="also time a LoRA on cached bases")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--part", choices=["ours", "auto", "second", "baseline"], help="for the script itself"
    )
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    rank = float(words.rank) if "." in words.rank else int(words.rank)
    if words.part == "ours":
        print(json.dumps(ours(words.folder, rank)))
        return
    if words.part == "auto":
        print(json.dumps(automatic(words.folder)))
        return
    if words.part == "second":
        print(json.dumps(second(words.folder, rank)))
        return
    if words.part == "baseline":
        print(json.dumps(baseline(words.folder, rank, words.baseline_every)))
        return
    if not (words.folder / "lora.safetensors").exists():
        import sdxl

        sdxl.write_all(words.folder)
    mine, theirs = in_own_process("ours", words), in_own_process("baseline", words)
    again = in_own_process("second", words) if words.second else None
    default = in_own_process("auto", words)
    result = {
        "what": "SDXL rank-32 LoRA, 560 attention modules, onto SSD-1B; generated fp16 weights",
        "baseline": "torch.linalg.svd layer by layer (float32) and dense projectors",
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": f"python bench/sdxl_to_ssd1b.py FOLDER --rank {words.rank} --threads "
        f"{words.threads} --baseline-every {words.baseline_every}",
        "machine": {"cpu": cpu(), "threads": words.threads, "torch": torch.__version__},
        "load": os.getloadavg(),
        "prolora": mine,
        "prolora, second LoRA (bases cached)": again,
        "prolora, method auto": default,
        "torch": theirs,
        "baseline / prolora": {
            "whole": theirs["seconds"] / mine["seconds"],
            "svd": theirs["stages"]["svd"] / mine["stages"]["svd"],
            "projection": theirs["stages"]["project"] / mine["stages"]["project"],
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if words.out:
        words.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
