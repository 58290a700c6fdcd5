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
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import sdxl
import torch
from gpu.machine import find_commit
from timing import peak_gib
from torch import Tensor

import prolora
from prolora.moving.plan import make_plan

Rank = int | float


def transfer(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Runs the whole job through the public file-to-file call; its report, and what it took."""
    paths = [folder / name for name in ("lora.safetensors", "sdxl", "ssd-1b")]
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)  # else it would be kept
    started, worked = time.perf_counter(), time.process_time()
    report = prolora.transfer(*paths, out=out, **options).report
    return report, {
        "seconds": time.perf_counter() - started,
        "processor seconds": time.process_time() - worked,
        "stages": report.seconds,
        "peak resident GiB": peak_gib(),
    }


def project(folder: Path, rank: Rank, _: int) -> dict[str, Any]:
    """Method `prolora`, with bases that nobody has decomposed before."""
    report, facts = transfer(folder, rank=rank, method="prolora")
    measured = [row.measures for row in report.rows("mapped") if row.measures]
    columns = [one.columns_source for one in measured]
    return facts | {
        "share of svd": report.seconds["svd"] / facts["seconds"],
        "totals": report.totals,
        "columns": [min(columns), max(columns)],
        "largest bound": max(one.bound for one in measured),
    }


def copy(folder: Path, *_: object) -> dict[str, Any]:
    """The default: both bases looked at, then copied, without any decomposition."""
    report, facts = transfer(folder)
    return facts | {"method": report.method}


def project_again(folder: Path, rank: Rank, _: int) -> dict[str, Any]:
    """The same LoRA again, with the subspaces kept from the first time."""
    options = {"method": "prolora", "rank": rank, "cache": folder / f"cache-{rank}"}
    transfer(folder, **options)
    facts = transfer(folder, **options)[1]
    size = sum(file.stat().st_size for file in options["cache"].rglob("*.safetensors"))
    return facts | {"cache GiB": size / 2**30}


def baseline(folder: Path, rank: Rank, every: int) -> dict[str, Any]:
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


def leading(weight: Tensor, rank: Rank) -> tuple[Tensor, Tensor]:
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


PARTS: dict[str, Callable[[Path, Rank, int], dict[str, Any]]] = {
    "prolora": project,
    "torch": baseline,
    "prolora, second LoRA (bases cached)": project_again,
    "prolora, method auto": copy,
}


def in_own_process(part: str, words: argparse.Namespace) -> dict[str, Any]:
    """Runs this script for one part and reads what it prints."""
    command = [sys.executable, __file__, str(words.folder), "--part", part, "--rank", words.rank]
    command += ["--threads", str(words.threads), "--baseline-every", str(words.baseline_every)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


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
    parser.add_argument("--part", choices=PARTS, help="for the script itself")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    if words.part:
        rank = float(words.rank) if "." in words.rank else int(words.rank)
        print(json.dumps(PARTS[words.part](words.folder, rank, words.baseline_every)))
        return
    if not (words.folder / "lora.safetensors").exists():
        sdxl.write_all(words.folder)
    wanted = [part for part in PARTS if PARTS[part] is not project_again or words.second]
    parts = {part: in_own_process(part, words) for part in wanted}
    mine, theirs = parts["prolora"], parts["torch"]
    result = {
        "what": "SDXL rank-32 LoRA, 560 attention modules, onto SSD-1B; generated fp16 weights",
        "baseline": "torch.linalg.svd layer by layer (float32) and dense projectors",
        "date": date.today().isoformat(),
        "commit": find_commit(),
        "command": f"python bench/sdxl_to_ssd1b.py FOLDER --rank {words.rank} --threads "
        f"{words.threads} --baseline-every {words.baseline_every}",
        "machine": {"cpu": cpu(), "threads": words.threads, "torch": torch.__version__},
        "load": os.getloadavg(),
        **parts,
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
