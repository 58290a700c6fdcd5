"""Memory and time of opening and reading a Qwen-Image-shaped file of every quantised kind.

    python bench/quantised_bases.py [--blocks N] [--kind KIND] [--json FILE]

Each file has the names and shapes of all matrices of Qwen-Image as its library stores them. Codes,
and larger scales, are holes of the file, which take no space on a disk and are read as zeros:
neither memory nor time depends on their values. Every weight of the first N blocks and outside of
all blocks is read, one at a time, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import peak_gib
from torch import Tensor

from prolora import open_base
from prolora.architectures.layouts import load_layout
from prolora.files.dtypes import name_dtype

LAYOUT = "qwen-image"
Part = tuple[torch.dtype, tuple[int, ...]] | Tensor
"""What a hole of the file stands for, or a tensor."""
Parts = dict[str, Part]


def write_file(path: Path, parts: Parts, metadata: dict[str, str]) -> None:
    """A safetensors file with its larger tensors as holes."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    written: list[tuple[int, Tensor]] = []
    for key, part in parts.items():
        dtype, shape = (part.dtype, tuple(part.shape)) if isinstance(part, Tensor) else part
        size = math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": name_dtype(dtype),
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        if isinstance(part, Tensor):
            written.append((end, part))
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for start, tensor in written:
            file.seek(8 + len(text) + start)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def note(**content: object) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def nf4(name: str, m: int, n: int) -> Parts:
    from prolora.bases.quantised.bitsandbytes import _NF4

    key, blocks = f"{name}.weight", m * n // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [m, n]}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    return {
        key: (torch.uint8, (m * n // 2, 1)),
        f"{key}.absmax": (torch.uint8, (blocks,)),
        f"{key}.quant_map": torch.tensor(_NF4),
        f"{key}.nested_absmax": (torch.float32, (-(-blocks // 256),)),
        f"{key}.nested_quant_map": torch.linspace(-1, 1, 256),
        f"{key}.quant_state.bitsandbytes__nf4": note(**state, **nested),
    }


def bnb_int8(name: str, m: int, n: int) -> Parts:
    return {f"{name}.weight": (torch.int8, (m, n)), f"{name}.SCB": torch.ones(m)}


def comfy(
    name: str, codes: tuple[torch.dtype, tuple[int, ...]], scale: object, **told: object
) -> Parts:
    key = f"{name}.weight"
    return {key: codes, f"{key}_scale": scale, f"{name}.comfy_quant": note(**told)}  # type: ignore[dict-item]


def nvfp4(name: str, m: int, n: int) -> Parts:
    scale = torch.float8_e4m3fn, (-(-m // 128) * 128, -(-n // 64) * 4)
    parts = comfy(name, (torch.uint8, (m, n // 2)), scale, format="nvfp4")
    return parts | {f"{name}.weight_scale_2": torch.tensor(0.01)}


def mxfp8(name: str, m: int, n: int) -> Parts:
    scale = torch.float8_e8m0fnu, (-(-m // 128) * 128, -(-n // 128) * 4)
    return comfy(name, (torch.float8_e4m3fn, (m, n)), scale, format="mxfp8")


def int8_rotated(name: str, m: int, n: int) -> Parts:
    told = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    return comfy(name, (torch.int8, (m, n)), torch.ones(m, 1), **told)


def float8(name: str, m: int, n: int) -> Parts:
    return {f"{name}.weight": (torch.float8_e4m3fn, (m, n)), f"{name}.weight_scale": torch.ones(())}


KINDS: dict[str, Callable[[str, int, int], Parts]] = {
    "float8 with scales": float8,
    "bitsandbytes nf4, nested": nf4,
    "bitsandbytes int8": bnb_int8,
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "int8 by row, rotated": int8_rotated,
}


def measure_reading(path: Path, blocks: int) -> dict[str, float]:
    """Seconds and memory of one file; in a process of its own, whose peak it takes."""
    before, start = peak_gib(), time.perf_counter()
    base = open_base(path)
    opened = time.perf_counter() - start
    inside = [name for name in base.shapes if name.startswith("transformer_blocks.")]
    first = {name for name in inside if int(name.split(".")[1]) < blocks}
    read = [name for name in base.shapes if name in first or name not in inside]
    numbers = 0
    for name in read:
        numbers += base.read(name).numel()
    seconds = time.perf_counter() - start - opened
    return {
        "weights": len(base.shapes),
        "read": len(read),
        "numbers": numbers,
        "opened_s": round(opened, 2),
        "read_s": round(seconds, 1),
        "before_gib": round(before, 2),
        "peak_gib": round(peak_gib(), 2),
        "largest_gib": round(max(4 * math.prod(s) for s in base.shapes.values()) / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kind", action="append", choices=KINDS, help="some of them alone")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        print(json.dumps(measure_reading(options.file, options.blocks)))
        return
    shapes = {name: shape for name, shape in load_layout(LAYOUT).shapes.items() if len(shape) == 2}
    rows = {}
    for kind in options.kind or KINDS:
        make = KINDS[kind]
        parts: Parts = {}
        for name, (m, n) in shapes.items():
            parts |= make(name, m, n)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "base.safetensors"
            write_file(path, parts, {})
            command = [
                sys.executable,
                __file__,
                "--file",
                str(path),
                "--blocks",
                str(options.blocks),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[kind] = {"file_gb": round(path.stat().st_size / 1e9, 1), **json.loads(done.stdout)}
        print(kind, rows[kind], flush=True)
    if options.json:
        told = {"layout": LAYOUT, "blocks_read": options.blocks, "torch": torch.__version__}
        options.json.write_text(json.dumps(told | {"kinds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
