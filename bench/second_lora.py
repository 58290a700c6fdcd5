"""What a LoRA costs once the bases are known: SDXL rank 32, attention + feed-forward, onto SSD-1B.

    python bench/second_lora.py FOLDER [--rank 128] [--threads 2] [--parts cold,warm,ten,dense]
                                [--out bench/results/second_lora.json]

FOLDER receives 6.5 GB of generated checkpoints (bench/sdxl.py --feed-forward) and keeps them. Every
part runs in a process of its own, and what `--out` holds of other parts stays there:

* reading: every byte of both bases and of the LoRA once, into one small buffer, nothing done to
  it; and every tensor of them through safetensors.
* cold, warm: one LoRA with an empty cache, and three times with a full one.
* disk: reading and `warm` once more, with none of the files in the page cache.
* ten: ten LoRAs in one call with an empty cache, against `cold`.
* hundred: a hundred of rank 8 with a full cache.
* bounded: `cold` under --max-memory 1.25GiB.
* dense: what a warm transfer replaces, for one pair of every shape, scaled up: P·ΔW·Q with the
  projectors as matrices, and with the projectors kept thin but the update dense. The subspaces are
  given to it.

Peaks are VmHWM of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import sdxl
import torch
from safetensors import safe_open
from sdxl_to_ssd1b import commit, cpu, project_densely
from timing import peak_gib
from torch import Tensor

import prolora
from prolora.bases.cache.basis_cache import BasisCache
from prolora.files.sizes import parse_size
from prolora.workflow.plan import make_plan

BOUND = "1.25GiB"


def paths(folder: Path) -> list[Path]:
    """LoRA, source, target and output."""
    return [folder / name for name in ("lora.safetensors", "sdxl", "ssd-1b", "out.safetensors")]


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    started = time.perf_counter()
    found = what()
    return time.perf_counter() - started, found


def one(folder: Path, rank: int | float, **options: Any) -> dict[str, Any]:
    """One transfer."""
    seconds, report = timed(
        lambda: (
            prolora.transfer(
                *paths(folder)[:3],
                out=paths(folder)[3],
                method="prolora",
                rank=rank,
                cache=folder / f"cache-{rank}",
                **options,
            ).report
        )
    )
    bounds = [row.measures.bound for row in report.rows("mapped") if row.measures]
    return {
        "seconds": seconds,
        "stages": report.seconds,
        "mapped": report.totals["mapped"],
        "flagged": report.totals["flagged"],
        "largest bound": max(bounds),
    }


def reading(folder: Path, rank: int | float) -> dict[str, Any]:
    """The least that any tool does that looks at the files once."""
    lora, source, target, _ = paths(folder)
    files = [lora, *source.rglob("*.safetensors"), *target.rglob("*.safetensors")]
    buffer = bytearray(8 << 20)

    def plain() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    def tensors() -> None:
        for file in files:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():
                    opened.get_tensor(key).clone()

    plain()  # from now on the files are in the page cache, if they fit
    return {
        "GB": sum(file.stat().st_size for file in files) / 1e9,
        "seconds": sorted(timed(plain)[0] for _ in range(3))[1],
        "seconds through safetensors, every tensor copied": timed(tensors)[0],
    }


def cold(folder: Path, rank: int | float) -> dict[str, Any]:
    """With an empty cache."""
    shutil.rmtree(folder / f"cache-{rank}", ignore_errors=True)
    found = one(folder, rank)
    size = sum(f.stat().st_size for f in (folder / f"cache-{rank}").rglob("*") if f.is_file())
    return found | {"cache GiB": size / 2**30, "peak GiB": peak_gib()}


def warm(folder: Path, rank: int | float) -> dict[str, Any]:
    """With a full one; the median of three."""
    one(folder, rank)
    runs = sorted((one(folder, rank) for _ in range(3)), key=lambda run: run["seconds"])
    return runs[1] | {"all seconds": [run["seconds"] for run in runs], "peak GiB": peak_gib()}


def bounded(folder: Path, rank: int | float) -> dict[str, Any]:
    """Within a bound, from an empty cache."""
    limit = parse_size(BOUND)
    shutil.rmtree(folder / f"cache-{rank}", ignore_errors=True)
    found = one(folder, rank, max_memory=limit)
    return {"bound GiB": limit / 2**30} | found | {"peak GiB": peak_gib()}


def disk(folder: Path, rank: int | float) -> dict[str, Any]:
    """Reading once, and a warm transfer, when the operating system has none of the files."""
    lora, source, target, _ = paths(folder)
    files = [lora, *source.rglob("*.safetensors"), *target.rglob("*.safetensors")]
    kept = [file for file in (folder / f"cache-{rank}").rglob("*") if file.is_file()]

    def forget(some: list[Path]) -> None:
        for file in some:
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    forget(files)
    buffer = bytearray(8 << 20)
    started = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    seconds = time.perf_counter() - started
    forget([*files, *kept])
    return {"reading": seconds, "warm": one(folder, rank)}


def many(folder: Path, rank: int | float, lora: Path, count: int) -> dict[str, Any]:
    """Copies of a LoRA under other names, in one call."""
    loras = folder / "loras"
    shutil.rmtree(loras, ignore_errors=True)
    loras.mkdir()
    names = []
    for i in range(count):
        names.append(loras / f"{lora.stem}-{i}.safetensors")
        names[-1].symlink_to(lora)
    moved = folder / "moved"
    shutil.rmtree(moved, ignore_errors=True)
    _, source, target, _ = paths(folder)
    seconds, outcomes = timed(
        lambda: prolora.transfer_many(
            names,
            source,
            target,
            moved,
            method="prolora",
            rank=rank,
            cache=folder / f"cache-{rank}",
        )
    )
    shutil.rmtree(moved)
    stages: dict[str, float] = {}
    for outcome in outcomes:
        assert outcome.report is not None
        for stage, spent in outcome.report.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + spent
    return {
        "LoRAs": count,
        "MB each": lora.stat().st_size / 1e6,
        "seconds": seconds,
        "moved": sum(outcome.status == "moved" for outcome in outcomes),
        "stages, threads added up": stages,
        "peak GiB": peak_gib(),
    }


def ten(folder: Path, rank: int | float) -> dict[str, Any]:
    """Ten, with an empty cache."""
    shutil.rmtree(folder / f"cache-{rank}", ignore_errors=True)
    return many(folder, rank, paths(folder)[0], 10)


def hundred(folder: Path, rank: int | float) -> dict[str, Any]:
    """A hundred of rank 8, with a full cache."""
    small = folder / "lora-8.safetensors"
    if not small.exists():
        sdxl.write_lora(small, feed_forward=True, rank=8)
    return many(folder, rank, small, 100)


def dense(folder: Path, rank: int | float) -> dict[str, Any]:
    """Layer by layer with dense updates, subspaces given; one pair of each shape stands for all."""
    adapter = prolora.adapters.read_adapter(paths(folder)[0])
    source, target = (prolora.open_base(path) for path in paths(folder)[1:3])
    cache = BasisCache(folder / f"cache-{rank}")
    seconds = {"projectors as matrices": 0.0, "thin projectors": 0.0}
    run = pairs = 0
    for group in make_plan(adapter, source, target).groups().values():
        pair = group[0]
        delta = adapter.updates[pair.source].dense()
        found = [cache.of(source, [pair.source], rank)[0], cache.of(target, [pair.target], rank)[0]]
        bases = [(basis.U, basis.V) for basis in found]
        for name, way in (
            ("projectors as matrices", project_densely),
            ("thin projectors", project_thinly),
        ):
            seconds[name] += len(group) * timed(lambda w=way, d=delta, b=bases: w(d, *b))[0]  # type: ignore[misc]
        run, pairs = run + 1, pairs + len(group)
    return {"seconds": seconds, "pairs": pairs, "pairs really run": run}


def project_thinly(
    delta: Tensor, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]
) -> Tensor:
    """The same without a projector as a matrix: only the update is dense."""
    (us, vs), (ut, vt) = source, target

    def inside(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return u @ ((u.mT @ x) @ v) @ v.mT

    def outside(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        x = x - u @ (u.mT @ x)
        return x - (x @ v) @ v.mT

    return inside(inside(delta, us, vs), ut, vt) + outside(outside(delta, us, vs), ut, vt)


PARTS = {
    "reading": reading,
    "cold": cold,
    "warm": warm,
    "disk": disk,
    "bounded": bounded,
    "dense": dense,
    "ten": ten,
    "hundred": hundred,
}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """What the parts say of each other."""
    said: dict[str, float] = {}
    if "warm" in found:
        seconds = found["warm"]["seconds"]
        if "dense" in found:
            for name, spent in found["dense"]["seconds"].items():
                said[f"dense ({name}) / warm"] = spent / seconds
        if "reading" in found:
            for name, spent in found["reading"].items():
                if isinstance(spent, float) and name != "GB":
                    said[f"warm / reading: {name}"] = seconds / spent
    if "disk" in found:
        said["warm / reading, both from the disk"] = (
            found["disk"]["warm"]["seconds"] / found["disk"]["reading"]
        )
    if "cold" in found and "ten" in found:
        said["ten / one, both cold"] = found["ten"]["seconds"] / found["cold"]["seconds"]
    return said


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", default="128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=PARTS, help="for the script itself")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    rank = float(words.rank) if "." in words.rank else int(words.rank)
    folder = words.folder.resolve()
    if words.part:
        print(json.dumps(PARTS[words.part](folder, rank)))
        return
    if not (folder / "lora.safetensors").exists():
        sdxl.write_all(folder, feed_forward=True)
    found: dict[str, Any] = {}
    if words.out and words.out.exists():
        found = json.loads(words.out.read_text())
    for part in words.parts.split(","):
        line = [sys.executable, __file__, str(folder), "--part", part, "--rank", words.rank]
        line += ["--threads", str(words.threads)]
        said = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[part] = json.loads(said) | {"commit": commit(), "date": date.today().isoformat()}
        print(part, said, flush=True)
        found |= {
            "what": "SDXL rank-32 LoRA on attention and feed-forward, onto SSD-1B; generated fp16",
            "command": f"python bench/second_lora.py FOLDER --rank {words.rank}",
            "machine": {"cpu": cpu(), "threads": words.threads, "torch": torch.__version__},
            "ratios": ratios(found),
        }
        if words.out:
            words.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["ratios"], indent=1))


if __name__ == "__main__":
    main()
