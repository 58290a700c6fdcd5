"""A dry run of the largest families' bases, from headers alone: time and memory.

    python bench/families.py FOLDER [--json FILE]

The files are sparse, so that 40 GB of zeros take no room. Every run is a process of its own; its
peak memory is VmHWM.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch

from prolora.adapters import Adapter, write_adapter
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout
from prolora.core.lowrank import LowRank
from prolora.version import __version__

HEADERS = ("qwen-image", "wan-t2v-14b", "wan2.2-i2v-14b", "flux2-dev", "hidream-i1", "ltx2")
RANK = 16
_RUN = """
import json, sys, time
lora, source, target = sys.argv[1:]
import prolora
start = time.perf_counter()
report = prolora.transfer(lora, source, target, dry_run=True).report
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "seconds": round(seconds, 2), "peak_GiB": round(int(peak) / 2**20, 2),
    "modules": len(report.modules), "coverage": round(report.coverage, 4), "method": report.method,
}))
"""


def linear_shapes(layout: str) -> dict[str, tuple[int, int]]:
    """The matrices of a published size."""
    shapes = load_layout(layout).shapes.items()
    return {name: (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2}


def write_lora(path: Path, layout: str) -> None:
    """A LoRA on all matrices of the blocks, in ComfyUI's spelling or the family's first."""
    family = next(one for one in known_families().values() if layout in one.layouts)
    updates = {}
    for name, (m, n) in linear_shapes(layout).items():
        if any(word.isdecimal() for word in name.split(".")[:-1]):
            generator = torch.Generator().manual_seed(len(updates))
            up = torch.randn(m, RANK, generator=generator) * 0.3 / m**0.5
            down = torch.randn(RANK, n, generator=generator) / n**0.5
            updates[name] = LowRank(up, down)
    format = "comfy" if "comfy" in family.spellings else next(iter(family.spellings))
    adapter = Adapter(updates, family=family.id, dtype=torch.bfloat16)
    write_adapter(adapter, path, format=format)


def write_hollow_base(path: Path, layout: str) -> None:
    """A checkpoint of zeros that takes no room: a header and a hole."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in load_layout(layout).shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        at = [start, end]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": [*shape], "data_offsets": at}
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def plan_from_headers(folder: Path) -> list[dict[str, object]]:
    """A dry run of every large layout."""
    rows = []
    for layout in HEADERS:
        files = [folder / f"{layout}.{part}.safetensors" for part in ("lora", "a", "b")]
        write_lora(files[0], layout)
        for base in files[1:]:
            write_hollow_base(base, layout)
        row = {"layout": layout, "base_GB": round(files[1].stat().st_size / 1e9, 1)}
        run = [sys.executable, "-c", _RUN, *map(str, files)]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        rows.append(row | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        for path in files:
            path.unlink()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "prolora": __version__,
        "rows": plan_from_headers(arguments.folder),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
