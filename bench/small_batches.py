"""`project` and `truncated_svd` over ten lines of torch, from 64 x 64 to 1280 x 1280.

    python bench/small_batches.py                 # prints the table
    python bench/small_batches.py --save          # also keeps it in bench/results
    python bench/small_batches.py --check         # compares with the kept one, exit code 1 at +15 %
    python bench/small_batches.py --threads 2     # wall time on two threads
    python bench/small_batches.py --page          # writes the kept ones to docs/performance.md

A figure is a ratio: CPU seconds of prolora over those of the baseline, timed in turns in one run,
the minimum of each. Weights are generated: a power law of singular values, or white (random). Keep
the machine quiet. `--check` compares nothing if the processor or torch is another than the kept
one's. `pytest bench/test_small_batches.py` runs the same rows as benchmarks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import prolora

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from results import fill_page, format_table

KEPT = Path(__file__).parent / "results" / "small_batches.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
# Slower by this share than the kept ratio is a failure.
SLOWER = 0.15
LARGEST = 2560
Update = Tensor | tuple[Tensor, Tensor]
# (size, number of weights): powers of the spectrum i^-p, 0 for white.
SQUARES = {
    **{(size, b): (0.5, 1, 0) for size, b in ((64, 1), (64, 8), (128, 8), (256, 8), (320, 8))},
    (512, 4): (0.5, 1, 0),
    **{(size, 1): (0.5, 0.7, 1, 0) for size in (640, 1280)},
}
WIDE = ((640, 2048), (640, 2560), (1280, 2048))
# (size, number of weights, rank, power of the spectrum) of truncated_svd.
BASES = [
    *((size, 8, 32, 0.5) for size in (64, 128, 256, 512)),
    *((size, 1, 0.99, p) for size, p in ((320, 0.5), (640, 0.5), (640, 0.7), (1280, 0.5))),
    *((1280, 1, 0.99, p) for p in (0.7, 1, 1.5)),
]


def ten_lines(delta: Update, source: Tensor, target: Tensor, energy: float = 0.99) -> Update:
    """ProLoRA (arXiv 2506.04244, eq. 1-3) as one writes it in torch: the fixed baseline."""

    def bases(w: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        held = s.square().cumsum(-1)
        k = (held < energy * held[..., -1:]).sum(-1) + 1
        used = (torch.arange(s.shape[-1]) < k[..., None]).float()[..., None, :]
        return u * used, vt.mT * used

    def move(x: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        inside = one @ (one.mT @ x)
        outside = x - inside
        return two @ (two.mT @ inside), outside - two @ (two.mT @ outside)

    (us, vs), (ut, vt) = bases(source), bases(target)
    if isinstance(delta, tuple):
        up, down = move(delta[0], us, ut), move(delta[1].mT, vs, vt)
        return torch.cat(up, -1), torch.cat(down, -1).mT
    inside, outside = move(delta, us, ut)
    return move(inside.mT, vs, vt)[0].mT + move(outside.mT, vs, vt)[1].mT


def make_weights(b: int, m: int, n: int, power: float) -> Tensor:
    """Returns float32 weights [b, m, n] with singular values i^-power, or white ones."""
    generator = torch.Generator().manual_seed(m)
    if not power:
        return torch.randn(b, m, n, generator=generator) / n**0.5
    d = min(m, n)
    u = torch.linalg.qr(torch.randn(b, m, d, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(b, n, d, generator=generator))[0]
    return (u * torch.arange(1, d + 1.0) ** -power) @ v.mT


def list_cases(largest: int) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Yields names, prolora's call and the baseline's, of sizes up to `largest`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, size, size, p) for (size, b), powers in SQUARES.items() for p in powers]
    shapes += [(1, m, n, 0.5) for m, n in WIDE]
    for b, m, n, power in shapes:
        if max(m, n) > largest:
            continue
        source = make_weights(b, m, n, power)
        target = source + 0.1 * torch.randn(b, m, n, generator=generator) / n
        up = torch.randn(b, m, 16, generator=generator)
        updates = {"factors": (up, torch.randn(b, 16, n, generator=generator))}
        if m == n:
            updates = {"dense": torch.randn(b, m, n, generator=generator)} | updates
        for kind, update in updates.items():
            spectrum = f"i^-{power:g}" if power else "white"
            yield (
                f"project, {b} x {m} x {n}, {spectrum}, {kind}",
                lambda x=update, s=source, t=target: prolora.project(x, s, t),
                lambda x=update, s=source, t=target: ten_lines(x, s, t),
            )
    for size, b, rank, power in BASES:
        if size > largest:
            continue
        weights = make_weights(b, size, size, power)
        yield (
            f"truncated_svd, {b} x {size} x {size}, i^-{power:g}, {rank}",
            lambda w=weights, k=rank: prolora.truncated_svd(w, k),
            lambda w=weights: torch.linalg.svd(w, full_matrices=False),
        )


def time_in_turns(
    calls: tuple[Callable[[], object], ...], clock: Callable[[], float], seconds: float
) -> list[float]:
    """Returns the least time of each call; they take turns for so long, three times at least."""
    least, begun, rounds = [float("inf")] * len(calls), time.monotonic(), 0
    while rounds < 3 or (time.monotonic() - begun < seconds and rounds < 40):
        for i, call in enumerate(calls):
            start = clock()
            call()
            least[i] = min(least[i], clock() - start)
        rounds += 1
    return least


def describe_machine() -> dict[str, str]:
    """Names the processor and torch: ratios are compared only where both are the same."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    stepping = [line.partition(":")[2].strip() for line in lines if line.startswith("model\t")]
    processor = f"{names[0]}, model {stepping[0]}" if names and stepping else "unknown"
    return {"processor": processor, "torch": torch.__version__}


def find_slower(rows: dict[str, float], kept: dict[str, float]) -> list[str]:
    """Lists the rows whose ratio is more than SLOWER above the kept one."""
    return [
        f"{name}: {ratio:.2f}, kept {kept[name]:.2f}"
        for name, ratio in rows.items()
        if name in kept and ratio > kept[name] * (1 + SLOWER)
    ]


def check_ratios(rows: dict[str, float], file: Path) -> int:
    """Prints what is slower than the ratios in `file`; returns 1 if any row is.

    Returns 0 if there is no file, or if it is of another processor or torch: times of two machines
    cannot be compared.
    """
    if not file.is_file():
        print(f"no ratios are kept in {file.name}: run with --save")
        return 0
    kept, here = json.loads(file.read_text()), describe_machine()
    there = {name: kept[name] for name in here}
    if there != here:
        print(f"not compared: {file.name} is of {there}, this is {here}")
        return 0
    missing = rows.keys() - kept["ratios"].keys()
    if missing:
        print("without a kept ratio:", *sorted(missing), sep="\n  ")
    slower = find_slower(rows, kept["ratios"])
    if slower:
        print(f"slower by more than {SLOWER:.0%}:", *slower, sep="\n  ")
    else:
        print(f"no row of {len(rows) - len(missing)} is slower by more than {SLOWER:.0%}")
    return int(bool(slower))


def fill_tables(page: str, ratios: dict[str, float]) -> str:
    """Returns the page with the tables of `project` and of `truncated_svd`."""
    project = dict[str, dict[str, str]]()
    bases = []
    for name, ratio in ratios.items():
        call, shape, spectrum, last = name.split(", ")
        case = f"{shape.replace(' x ', ' × ')}, {spectrum}"
        if call == "project":
            project.setdefault(case, {})[last] = f"{ratio:.2f}"
        else:
            bases.append([f"{case}, rank {last}", f"{ratio:.2f}"])
    rows = [
        [case, *(cells.get(x, "–") for x in ("dense", "factors"))]
        for case, cells in project.items()
    ]
    tables = {
        "project": format_table(["weights", "dense update", "factors of rank 16"], rows),
        "truncated_svd": format_table(["weights", "ratio"], bases),
    }
    return fill_page(page, tables)


def main(arguments: list[str] | None = None) -> int:
    """Times the cases, prints them, and keeps or compares the ratios."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the ratios")
    parser.add_argument("--check", action="store_true", help="compare with the kept ratios")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--largest", type=int, default=LARGEST, help="the longest side")
    parser.add_argument("--page", action="store_true", help="fill the tables of the page")
    options = parser.parse_args(arguments)
    if options.page:
        text = fill_tables(PAGE.read_text("utf-8"), json.loads(KEPT.read_text())["ratios"])
        PAGE.write_text(text, "utf-8")
        return 0
    if options.threads != 1 and (options.save or options.check):
        parser.error("kept ratios are CPU seconds on one thread: leave --threads out")
    if options.save and options.largest != LARGEST:
        parser.error("--save keeps the whole table: leave --largest out")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    rows = dict[str, float]()
    for name, ours, baseline in list_cases(options.largest):
        own, other = time_in_turns((ours, baseline), clock, 2.0)
        rows[name] = own / other
        print(
            f"{name:48} {own / other:5.2f}   ({own * 1e3:.1f} ms / {other * 1e3:.1f} ms)",
            flush=True,
        )
    if options.save:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        facts = {"date": str(date.today()), "commit": commit, "command": "--save"}
        kept = describe_machine() | facts | {"ratios": {x: round(y, 3) for x, y in rows.items()}}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    if options.check:
        return check_ratios(rows, KEPT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
