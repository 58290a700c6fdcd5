"""Peak memory on a FLUX-shaped pair within a bound: bfloat16, 3072 wide, generated.

    python bench/flux_memory.py FOLDER [--max-memory 2GiB] [--rank 128] [--threads 2]
                                [--out bench/results/flux_memory.json]

Two double and three single blocks, of FLUX.1's 19 and 38, with all their matrices: 2.2 GB a base.
What a transfer takes does not grow with the number of blocks, but for the LoRA itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import sdxl
import torch
from safetensors.torch import save_file
from sdxl_to_ssd1b import commit, cpu
from timing import peak_gib

import prolora
from prolora.files.sizes import parse_size

WIDTH = 3072
DOUBLE, SINGLE, LORA_RANK = 2, 3, 16
SQUARE = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


def shapes() -> dict[str, tuple[int, int]]:
    """Module -> out × in."""
    found = {}
    for i in range(DOUBLE):
        block = f"transformer_blocks.{i}"
        found |= {f"{block}.attn.{name}": (WIDTH, WIDTH) for name in SQUARE}
        for name in ("ff", "ff_context"):
            found[f"{block}.{name}.net.0.proj"] = (4 * WIDTH, WIDTH)
            found[f"{block}.{name}.net.2"] = (WIDTH, 4 * WIDTH)
    for i in range(SINGLE):
        block = f"single_transformer_blocks.{i}"
        found |= {f"{block}.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")}
        found[f"{block}.proj_mlp"] = (4 * WIDTH, WIDTH)
        found[f"{block}.proj_out"] = (WIDTH, 5 * WIDTH)
    return found


def write(folder: Path) -> None:
    """Both bases and the LoRA."""
    sdxl.POOL = 1
    for name, noise in (("source", 0.0), ("target", sdxl.NOISE)):
        sdxl.write_unet(folder / name / "transformer", shapes(), noise, 0, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (m, n) in shapes().items():
        up = torch.randn(m, LORA_RANK, generator=generator) / m**0.5
        down = torch.randn(LORA_RANK, n, generator=generator) / n**0.5
        tensors[f"transformer.{name}.lora_B.weight"] = up.bfloat16()
        tensors[f"transformer.{name}.lora_A.weight"] = down.bfloat16()
    save_file(tensors, folder / "lora.safetensors")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-memory", default="2GiB")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inner", action="store_true", help="for the script itself")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    folder, limit = words.folder, parse_size(words.max_memory)
    if not words.inner:
        if not (folder / "lora.safetensors").exists():
            write(folder)
        line = [sys.executable, __file__, *sys.argv[1:], "--inner"]
        subprocess.run(line, check=True)  # a process that has generated nothing
        return
    started = time.perf_counter()
    report = prolora.transfer_file(
        folder / "lora.safetensors",
        folder / "source",
        folder / "target",
        folder / "out.safetensors",
        method="prolora",
        rank=words.rank,
        threshold=0,
        max_memory=limit,
    )
    found = {
        "what": f"FLUX-shaped pair, {DOUBLE} double and {SINGLE} single blocks, bfloat16",
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": f"python bench/flux_memory.py FOLDER --max-memory {words.max_memory}",
        "machine": {"cpu": cpu(), "threads": words.threads, "torch": torch.__version__},
        "bound GiB": limit / 2**30,
        "peak GiB": peak_gib(),
        "seconds": time.perf_counter() - started,
        "stages": report.seconds,
        "mapped": report.totals["mapped"],
        "flagged": report.totals["flagged"],
    }
    print(json.dumps(found, indent=1))
    if words.out:
        words.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
