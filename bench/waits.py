"""How long one waits for a transfer: five families at full size, in a process of its own each.

    python bench/waits.py FOLDER [--families sd15 sdxl] [--threads 2]
    python bench/waits.py FOLDER --save      # also to bench/results and docs/performance.md

Everything is generated: no published weight is read. FOLDER receives a source, a target and a LoRA
for each family, at the published sizes and names of diffusers, and is emptied again after it:
FLUX.1 needs 48 GB. Entries of the weights are random numbers of deviation 0.02; the target is the
source plus a tenth of other random numbers. The LoRA has rank 16 on every attention and
feed-forward matrix. Each command is timed as a user waits for it, with the start of Python:

- first: `prolora transfer`, where neither model was seen before
- again: the same with another LoRA, when both models are known
- by headers: `prolora transfer --dry-run`, in another empty cache

The files were written just before, so that those that fit into memory are not read from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu.machine import find_commit
from torch import Tensor

from prolora.architectures.layouts import Layout, load_layout
from prolora.architectures.modules import BARE
from prolora.files.safetensors_writing import stream_safetensors, write_safetensors

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from results import fill_page, format_table

KEPT = Path(__file__).parent / "results" / "waits.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
FAMILIES = ("sd15", "sdxl", "wan-t2v-1.3b", "z-image", "flux1-dev")
UNETS = ("sd15", "sdxl")
RANK = 16
POOL = 1 << 26
Shape = tuple[int, ...]
Row = dict[str, Any]


def fill_table(page: str, rows: list[Row]) -> str:
    """Returns the page with the table of these rows."""
    titles = {family: load_layout(family).title for family in (row["family"] for row in rows)}
    cells = [
        [
            titles[row["family"]],
            f"{row['GB']} GB",
            str(row["modules"]),
            *(f"{row[name]:.1f} s" for name in ("by headers", "first", "again")),
        ]
        for row in rows
    ]
    head = ["model", "each file", "matrices of the LoRA", "dry run", "first LoRA", "next LoRA"]
    return fill_page(page, {"waits": format_table(head, cells)})


class Numbers:
    """A pool of random numbers in bfloat16; a tensor starts at a place of its own in it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pool = (0.02 * torch.randn(POOL, generator=generator)).bfloat16()

    def make(self, shape: Shape, place: int) -> Tensor:
        size = torch.Size(shape).numel()
        start = place * 7919 % POOL
        repeats = -(-(start + size) // POOL)
        return self.pool.repeat(repeats)[start : start + size].reshape(shape)


def write_base(path: Path, layout: Layout, numbers: Numbers, drift: float) -> None:
    """Writes the weights of a layout in bfloat16, a tensor at a time."""
    keys = {name: name if BARE.search(name) else f"{name}.weight" for name in layout.shapes}
    places = {key: i for i, key in enumerate(keys.values())}
    outline = {
        keys[name]: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in layout.shapes.items()
    }

    def read(key: str) -> Tensor:
        shape = tuple(outline[key].shape)
        weight = numbers.make(shape, places[key])
        return weight + drift * numbers.make(shape, places[key] + 100_003) if drift else weight

    path.parent.mkdir(parents=True, exist_ok=True)
    stream_safetensors(path, outline, {"format": "pt"}, read)


def write_lora(path: Path, layout: Layout, part: str, seed: int) -> None:
    """Writes a LoRA of rank 16 on attention and feed-forward, as diffusers names it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in layout.adapted:
        m, n = layout.sizes[name]
        for factor, shape in (("A", (RANK, n)), ("B", (m, RANK))):
            values = 0.02 * torch.randn(shape, generator=generator)
            tensors[f"{part}.{name}.lora_{factor}.weight"] = values.half()
    write_safetensors(path, tensors, {"format": "pt"})


def wait_for(words: list[str], cache: Path, threads: int) -> float:
    """Runs the command; returns its seconds."""
    environment = os.environ | {"PROLORA_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "prolora", *words],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return round(time.perf_counter() - begun, 2)


def measure(family: str, folder: Path, numbers: Numbers, threads: int) -> Row:
    layout = load_layout(family)
    part = "unet" if family in UNETS else "transformer"
    sides = [folder / side for side in ("source", "target")]
    file = "diffusion_pytorch_model.safetensors"
    for side, drift in zip(sides, (0.0, 0.1), strict=True):
        write_base(side / part / file, layout, numbers, drift)
    loras = [folder / f"lora{i}.safetensors" for i in range(2)]
    for i, lora in enumerate(loras):
        write_lora(lora, layout, part, i)
    common = ["--source", str(sides[0]), "--target", str(sides[1])]
    words = [["transfer", str(lora), *common, "-o", f"{lora}.moved.safetensors"] for lora in loras]
    row: Row = {
        "family": family,
        "GB": round((sides[0] / part / file).stat().st_size / 1e9, 1),
        "modules": len(layout.adapted),
        "by headers": wait_for([*words[0], "--dry-run"], folder / "empty", threads),
        "first": wait_for(words[0], folder / "cache", threads),
        "again": wait_for(words[1], folder / "cache", threads),
    }
    shutil.rmtree(folder)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="keep the result, and fill the page")
    options = parser.parse_args()
    rows, numbers = [], Numbers()
    for family in options.families:
        row = measure(family, options.folder / family, numbers, options.threads)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.save:
        result = {
            "weights": "generated",
            "date": date.today().isoformat(),
            "commit": find_commit(),
            "command": f"python bench/waits.py FOLDER --threads {options.threads} --save",
            "torch": torch.__version__,
            "rows": rows,
        }
        KEPT.write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(fill_table(PAGE.read_text("utf-8"), rows), "utf-8")


if __name__ == "__main__":
    main()
