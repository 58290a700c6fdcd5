"""project_many against transfer(method="prolora") on an SDXL LoRA: CPU seconds, memory, results.

    python bench/project_many.py FOLDER [--transfer-python PYTHON] [--rounds 3] [--threads 1]
                                 [--out bench/results/project_many.json]

FOLDER receives 2.9 GB of generated checkpoints (bench/sdxl.py) and keeps them for the next run.
Both read the same files, one module at a time, in processes of their own that run alternately.
`--transfer-python` is the Python of another environment, for example with the version before
`project_many` was written; `transfer` then runs there. CPU seconds are those of the whole job
without imports and without writing. The results are compared module by module.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import prolora

RANK, MAX_BYTES = 0.99, 512_000_000


class Weights(Mapping[str, Tensor]):
    """The weights of a base by the names of their modules, read when they are asked for."""

    def __init__(self, base: prolora.Base, names: Mapping[str, str]) -> None:
        self.base, self.names = base, names

    def __getitem__(self, name: str) -> Tensor:
        return self.base.read(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def measure(work: Callable[[], dict[str, Any]], out: Path) -> dict[str, Any]:
    """Runs a job once; writes its factors to `out` and returns what it took."""
    small = {"x": (torch.randn(8, 2), torch.randn(2, 8))}
    weight = {"x": torch.randn(8, 8)}
    prolora.project(small["x"], weight["x"], weight["x"])  # loads what is loaded at first use
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    wall, processor = time.perf_counter(), time.process_time()
    moved = work()
    took = {
        "CPU seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - wall,
        "peak bytes": resident("VmHWM") - before,
        "bytes of results": sum(x.nbytes for pair in moved.values() for x in pair),
    }
    factors = {
        f"{name}.{side}": x.float().contiguous()
        for name, pair in moved.items()
        for side, x in zip(("up", "down"), pair, strict=True)
    }
    save_file(factors, out)
    return took


def run_transfer(folder: Path) -> dict[str, Any]:
    """The public call; its factors by the names of the target's modules."""
    paths = [folder / name for name in ("lora.safetensors", "sdxl", "ssd-1b")]
    done = prolora.transfer(*paths, method="prolora", rank=RANK, threshold=0)
    return {name: (x.up, x.down) for name, x in done.adapter.updates.items()}


def run_project_many(folder: Path) -> dict[str, Any]:
    """The same job on `project_many`."""
    from prolora.moving.plan import make_plan

    source, target = (prolora.open_base(folder / name) for name in ("sdxl", "ssd-1b"))
    adapter = prolora.adapters.read_adapter(folder / "lora.safetensors")
    pairs = [
        pair for group in make_plan(adapter, source, target).groups().values() for pair in group
    ]
    deltas = {pair.target: adapter.updates[pair.source] for pair in pairs}
    sources = Weights(source, {pair.target: pair.source for pair in pairs})
    targets = Weights(target, {pair.target: pair.target for pair in pairs})
    return prolora.project_many(deltas, sources, targets, rank=RANK, max_bytes=MAX_BYTES)


JOBS = {"transfer": run_transfer, "project_many": run_project_many}


def compare(first: Path, second: Path) -> dict[str, Any]:
    """The largest relative difference of an update, over all modules."""
    one, other = load_file(first), load_file(second)
    names = {key.rpartition(".")[0] for key in one}
    differences = []
    for name in sorted(names):
        a, b = (x[f"{name}.up"].double() @ x[f"{name}.down"].double() for x in (one, other))
        differences.append(float((a - b).norm() / a.norm()))
    return {"modules": len(names), "largest difference": max(differences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transfer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", choices=JOBS, help="for the script itself")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    if words.job:
        factors = words.folder / f"factors-{words.job}.safetensors"
        print(json.dumps(measure(lambda: JOBS[words.job](words.folder), factors)))
        return
    import sdxl
    from gpu.machine import find_commit
    from sdxl_to_ssd1b import cpu

    if not (words.folder / "lora.safetensors").exists():
        sdxl.write_all(words.folder)
    pythons = {"transfer": words.transfer_python, "project_many": sys.executable}
    rows: dict[str, list[Any]] = {job: [] for job in JOBS}
    for _ in range(words.rounds):
        for job, python in pythons.items():
            command = [python, __file__, str(words.folder), "--job", job]
            command += ["--threads", str(words.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[job].append(json.loads(done.stdout))
            print(job, rows[job][-1], flush=True)
    seconds = {job: min(row["CPU seconds"] for row in rows[job]) for job in JOBS}
    result = {
        "what": "SDXL rank-32 LoRA, 560 attention modules, onto SSD-1B; generated fp16 weights",
        "date": date.today().isoformat(),
        "commit": find_commit(),
        "machine": {"cpu": cpu(), "threads": words.threads, "torch": torch.__version__},
        "rank": RANK,
        "max_bytes": MAX_BYTES,
        "CPU seconds": seconds,
        "project_many / transfer": seconds["project_many"] / seconds["transfer"],
        **compare(*(words.folder / f"factors-{job}.safetensors" for job in JOBS)),
        "rounds": rows,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if words.out:
        words.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
