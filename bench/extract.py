"""Time, memory and energy of extracting a LoRA from a full-size tuned base, beside a full SVD.

    python bench/sdxl.py FOLDER                          # once: writes FOLDER/sdxl
    python bench/extract.py FOLDER [--rank 32] [--json FILE]

The tuned base is FOLDER/sdxl plus, in every module, a difference of 5 % of its norm: 90 % of its
energy has rank 48 with a falling spectrum, and the rest is dense noise. The other extraction works
in the manner of sd-scripts' `extract_lora_from_models.py`, written anew: all differences are held
in float32, and each goes through `torch.linalg.svd`. sd-scripts also clamps the factors, and loads
both pipelines whole; both are left out here, in its favour. Each runs in a process of its own; on
one thread the seconds are those of the processor, which other load does not lengthen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CHANGE, LOW, RANK_OF_CHANGE = 0.05, 0.9, 48
_BEGIN = """
import json, sys, time, torch
base, tuned, out, rank, every = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
"""
_OURS = (
    _BEGIN
    + """
import prolora
start = clock()
report = prolora.extract_file(base, tuned, out, out_rank=rank, dtype="float32", overwrite=True)
seconds = clock() - start
flagged = sum("not proven" in row.reason for row in report.modules)
shares = {row.source: 1 - row.rank_cut_energy for row in report.rows("mapped")}
"""
)
_OTHER = (
    _BEGIN
    + """
from safetensors.torch import save_file
from prolora import open_base
start = clock()
old, new = open_base(base), open_base(tuned)
differences = {n: new.read(n).float() - old.read(n).float() for n in old.shapes}
read, sampled = clock() - start, list(differences)[::every]
factors, shares, start = {}, {}, clock()
for name in sampled:
    mat = differences[name]
    U, S, Vh = torch.linalg.svd(mat.flatten(1))
    factors[name + ".up"] = (U[:, :rank] * S[:rank]).contiguous()
    factors[name + ".down"] = Vh[:rank].contiguous()
    shares[name] = (S[:rank].double().square().sum() / S.double().square().sum()).item()
save_file(factors, out)
seconds, flagged = read + (clock() - start) * len(differences) / len(sampled), 0
"""
)
_END = """
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "seconds": round(seconds, 1), "peak_GiB": round(int(peak) / 2**20, 2), "flagged": flagged,
    "threads": torch.get_num_threads(), "shares": shares,
}))
"""


def change_weight(name: str, weight: Tensor) -> Tensor:
    """The weight after a training that changed it along few directions, and a little everywhere."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    flat = weight.float().flatten(1)
    m, n = flat.shape
    rank = min(RANK_OF_CHANGE, m, n)
    spectrum = torch.arange(1, rank + 1, dtype=torch.float32) ** -0.5
    low = torch.randn(m, rank, generator=generator) * spectrum
    low = low @ torch.randn(rank, n, generator=generator)
    noise = torch.randn(m, n, generator=generator)
    size = CHANGE * flat.norm()
    flat = flat + low * (size * LOW**0.5 / low.norm())
    flat = flat + noise * (size * (1 - LOW) ** 0.5 / noise.norm())
    return flat.reshape(weight.shape).to(weight.dtype)


def write_tuned(base: Path, tuned: Path) -> None:
    """The tuned base, shard by shard."""
    tuned.mkdir(parents=True, exist_ok=True)
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            (tuned / file.name).write_bytes(file.read_bytes())
            continue
        tensors = {n: change_weight(n, w) if w.dim() > 1 else w for n, w in load_file(file).items()}
        save_file(tensors, tuned / file.name)


def run(code: str, *arguments: object) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of one extraction in a process of its own, and the energy kept by module."""
    words = [sys.executable, "-c", code + _END, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    shares: dict[str, float] = figures.pop("shares")  # type: ignore[assignment]
    print(figures, flush=True)
    return figures | {"modules": len(shares)}, shares


def main() -> None:
    """Reads the arguments, measures, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--every", type=int, default=1, help="sample of the full SVDs, timed up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base, tuned = arguments.folder / "sdxl", arguments.folder / "sdxl-tuned"
    if not (tuned / "unet").is_dir():
        write_tuned(base / "unet", tuned / "unet")
    out = arguments.folder / "extracted.safetensors"
    words = base, tuned, out, arguments.rank, arguments.every
    ours, kept = run(_OURS, *words)
    out.unlink()
    other, best = run(_OTHER, *words)
    out.unlink()
    facts = {
        "rank": arguments.rank,
        "full_svd_of_every": arguments.every,
        "prolora": ours,
        "full_svd": other,
        "seconds_ratio": round(ours["seconds"] / other["seconds"], 3),
        "memory_ratio": round(ours["peak_GiB"] / other["peak_GiB"], 3),
        "energy_mean": sum(best.values()) / len(best),
        "energy_worst_difference": max(abs(kept[name] - best[name]) for name in best),
        "torch": torch.__version__,
    }
    print(json.dumps(facts, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
