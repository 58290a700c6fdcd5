"""A collection of small LoRAs onto three bases: what a plan costs, LoRAs a second, and memory.

    python bench/fleet.py FOLDER [--counts 200,2000] [--engine local] [--workers 1]
                          [--out bench/results/fleet.json]

FOLDER receives a generated base, three fine-tunes of it and as many LoRAs as the largest count
(some 30 kB each), and keeps them. Planning and migrating run in a process of their own, so that
peaks (VmHWM) are theirs; the calibration of the estimates is part of the plan's time. What `--out`
holds of other engines and counts stays there. With an engine that has workers, the peak is that of
the driver alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sdxl_to_ssd1b import commit, cpu
from timing import peak_gib

import prolora

WIDTH, BLOCKS, RANK, TARGETS = 64, 3, 4, 3
MODULES = {"attn1.to_q": WIDTH, "attn1.to_k": WIDTH, "attn2.to_v": 96, "ff.net.2": 4 * WIDTH}
NAME = "down_blocks.1.attentions.0.transformer_blocks.{}.{}"


def shapes() -> dict[str, tuple[int, int]]:
    """Module -> shape of its weight."""
    return {NAME.format(i, m): (WIDTH, n) for i in range(BLOCKS) for m, n in MODULES.items()}


def write_bases(folder: Path) -> tuple[Path, list[Path]]:
    """The source, and targets that are further and further from it."""
    random = torch.Generator().manual_seed(0)
    source = {name: torch.randn(shape, generator=random) for name, shape in shapes().items()}
    targets = []
    for number in range(TARGETS):
        drift = 0.02 * (number + 1)
        moved = {k: w + drift * torch.randn(w.shape, generator=random) for k, w in source.items()}
        targets.append(write_base(folder / f"target-{number + 1}", moved))
    return write_base(folder / "source", source), targets


def write_base(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A diffusers UNet folder; one that is there stays."""
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        stored = {f"{name}.weight": weight for name, weight in weights.items()}
        save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_loras(folder: Path, count: int) -> Path:
    """A folder with that many LoRAs, each with values of its own; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"lora-{number:05d}.safetensors"
        if path.exists():
            continue
        random = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (m, n) in shapes().items():
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_up.weight"] = torch.randn(m, RANK, generator=random)
            tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, n, generator=random)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
        save_file(tensors, path)
    return folder


def list_some(folder: Path, count: int) -> Path:
    """A list of the first LoRAs."""
    names = [f"loras/lora-{number:05d}.safetensors" for number in range(count)]
    path = folder / f"first-{count}.txt"
    path.write_text("\n".join(names) + "\n")
    return path


def make_plan(folder: Path, count: int) -> dict[str, Any]:
    """Plans the first LoRAs, and saves the plan."""
    source, targets = folder / "source", sorted(folder.glob("target-*"))
    started, before = time.perf_counter(), time.process_time()
    plan = prolora.plan_migration([list_some(folder, count)], source, targets)
    seconds, busy = time.perf_counter() - started, time.process_time() - before
    plan.save(folder / f"plan-{count}.jsonl")
    estimate = sum(entry.seconds for entry in plan.entries)
    return {
        "seconds": seconds,
        "CPU seconds": busy,
        "moves": len(plan.entries),
        "seconds estimated": estimate,
    }


def run_plan(folder: Path, count: int, engine: str, workers: int) -> dict[str, Any]:
    """Does the plan with an engine, then does it again, which finds nothing left."""
    out = folder / f"moved-{count}-{engine}-{workers}"
    shutil.rmtree(out, ignore_errors=True)
    options: dict[str, Any] = {"workers": workers} if engine != "local" else {}
    plan = folder / f"plan-{count}.jsonl"
    seconds, busy = [], []
    for _ in range(2):
        started, before = time.perf_counter(), time.process_time()
        summary = prolora.migrate(plan, out, engine=engine, **options)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - before)
    done = summary.count("done")
    return {
        "done": done,
        "seconds": seconds[0],
        "CPU seconds of this process": busy[0],
        "LoRAs a second": done / seconds[0],
        "seconds of the second run": seconds[1],
    }


def measure(part: str, folder: Path, count: int, engine: str, workers: int) -> dict[str, Any]:
    """A part in a process of its own, with its peak."""
    command = [sys.executable, __file__, str(folder), "--part", part, "--counts", str(count)]
    command += ["--engine", engine, "--workers", str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Writes the collection, measures, and notes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", default="200,2000")
    parser.add_argument("--engine", default="local")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("plan", "run"))
    args = parser.parse_args()
    counts = [int(text) for text in args.counts.split(",")]
    if args.part:
        if args.part == "plan":
            figures = make_plan(args.folder, counts[0])
        else:
            figures = run_plan(args.folder, counts[0], args.engine, args.workers)
        print(json.dumps(figures | {"peak GiB": peak_gib()}))
        return
    write_bases(args.folder)
    write_loras(args.folder / "loras", max(counts))
    results: dict[str, Any] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    results["what"] = f"LoRAs of rank {RANK}, {len(shapes())} modules, onto {TARGETS} bases"
    results["machine"] = {
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for count in counts:
        rest = (args.folder, count, args.engine, args.workers)
        results[f"plan of {count}"] = measure("plan", *rest)
        name = f"{args.engine}, {args.workers} workers, {count} LoRAs"
        results[name] = measure("run", *rest) | {"commit": commit(), "date": str(date.today())}
        print(json.dumps(results, indent=1))
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
