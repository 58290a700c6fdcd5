"""A collection of small LoRAs onto three bases: LoRAs a second, and memory.

    python bench/fleet.py FOLDER [--counts 200,2000] [--ray local] [--out bench/results/fleet.json]

FOLDER receives a generated base, three fine-tunes of it and as many LoRAs as the largest count
(some 30 kB each), and keeps them. Each migration runs in a process of its own, so that its peak
(VmHWM) and its CPU seconds are its own; those of Ray's processes are not counted.
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


def run(folder: Path, count: int, ray: str | None) -> dict[str, Any]:
    """Moves the first LoRAs, then does it again, which finds nothing left."""
    out = folder / f"moved-{count}-{ray or 'here'}"
    shutil.rmtree(out, ignore_errors=True)
    loras, targets = list_some(folder, count), sorted(folder.glob("target-*"))
    seconds, busy = [], []
    for status in ("moved", "already there"):
        started, before = time.perf_counter(), time.process_time()
        found = prolora.migrate(loras, folder / "source", targets, out, ray=ray)
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - before)
        assert {moved.status for moved in found} == {status} and len(found) == TARGETS * count
    return {
        "moves": len(found),
        "seconds": seconds[0],
        "CPU seconds": busy[0],
        "seconds of the second run": seconds[1],
        "CPU seconds of the second run": busy[1],
        "peak GiB": peak_gib(),
    }


def main() -> None:
    """Writes the collection, measures, and notes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", default="200,2000")
    parser.add_argument("--ray")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true")
    args = parser.parse_args()
    counts = [int(text) for text in args.counts.split(",")]
    if args.here:
        print(json.dumps(run(args.folder, counts[0], args.ray)))
        return
    write_bases(args.folder)
    write_loras(args.folder / "loras", max(counts))
    results: dict[str, Any] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    results["what"] = f"LoRAs of rank {RANK}, {len(shapes())} modules, onto {TARGETS} bases"
    results["machine"] = {"cpu": cpu(), "torch": torch.__version__}
    for count in counts:
        words = [sys.executable, __file__, str(args.folder), "--here", "--counts", str(count)]
        words += ["--ray", args.ray] if args.ray else []
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        name = f"{args.ray or 'one process'}, {count} LoRAs"
        results[name] = figures | {"commit": commit(), "date": str(date.today())}
        print(json.dumps(results, indent=1))
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
