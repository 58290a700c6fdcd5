"""truncated_svd beside other solvers, for sizes, ranks and spectra: a JSON file and a table.

    python bench/svd_table.py OUT.json [--clock cpu --sizes 1280x1280 --rounds 1]

Weights are float32 with planted spectra. Times are minima of rounds in which the solvers take
turns; `--clock cpu` is the processor time of all threads, for a busy machine. Bound and true sine
(against LAPACK in float64) stand beside each of ours; gesdd and ARPACK have the sine alone. A run
that was cut off goes on with the rows that OUT.json lacks; each row has the machine's load.
`--page` writes table and figure of docs/performance.md from bench/results/svd_table.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.sparse.linalg import svds
from torch import Tensor

import prolora

sys.path += [
    str(Path(__file__).parents[1] / folder) for folder in ("tests/support", "bench/quality")
]

from results import fill_page, format_table, save_figure
from spectra import planted, sine

SIZES = ["320x320", "640x640", "1280x1280", "1280x5120", "10240x1280", "3072x3072"]
RANKS = [64, 128, 320, 0.9, 0.99]
SPECTRA = ["i^-0.5", "i^-0.7", "i^-1", "flat", "outlier", "clustered", "deficient"]

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "bench/results/svd_table.json"
PAGE, FIGURE = ROOT / "docs/performance.md", ROOT / "docs/images/svd.svg"
COLUMNS = {0.99: "0.99, the default", 0.9: "0.9", 320: "k = 320", 128: "k = 128", 64: "k = 64"}


def make_values(name: str, d: int) -> Tensor:
    """Singular values [d] of a spectrum, descending."""
    i = torch.arange(1, d + 1, dtype=torch.float64)
    if name.startswith("i^-"):
        return i ** -float(name[3:])
    if name == "flat":
        return torch.linspace(1, 0.5, d, dtype=torch.float64)
    if name == "clustered":
        jitter = torch.rand(d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return (0.8 ** ((i - 1) // 50) * (1 + 1e-3 * jitter)).sort(descending=True)[0]
    values = i**-0.5
    if name == "outlier":
        values[0] = 30
    else:
        values[d // 2 :] = 0
    return values


def measure(w: Tensor, rank: int | float, clock: str, rounds: int) -> dict:
    """Times, errors and the solver of one case."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    basis = prolora.truncated_svd(w, rank)
    k = int(basis.rank)
    ways: dict = {
        "ours": lambda: prolora.truncated_svd(w, rank),
        "gesdd": lambda: torch.linalg.svd(w, full_matrices=False),
        "gram + eigh": lambda: torch.linalg.eigh(w.double() @ w.double().mT),
    }
    if 4 * k <= min(w.shape):
        ways["arpack"] = lambda: svds(w.numpy(), k=k, tol=0)
        ways["propack"] = lambda: svds(w.numpy(), k=k, solver="propack")
        ways["svd_lowrank"] = lambda: torch.svd_lowrank(w, q=k + 8, niter=4)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = now()
            way()
            taken[name].append(1e3 * (now() - began))
    u, _, vt = torch.linalg.svd(w.double(), full_matrices=False)
    left = {"ours": basis.U, "gesdd": torch.linalg.svd(w, full_matrices=False)[0]}
    sines = {name: sine(u[:, :k], x[:, :k]) for name, x in left.items()}
    sines["ours"] = max(sines["ours"], sine(vt[:k].mT, basis.V[:, :k]))
    ms = {name: round(min(times), 1) for name, times in taken.items()}
    facts = {"rank": rank, "columns": k, "solver": basis.solver, "bound": float(basis.bound)}
    facts["load"] = round(os.getloadavg()[0], 1)
    return facts | {"sines": sines, "ms": ms, "over gesdd": round(ms["ours"] / ms["gesdd"], 2)}


def fill_table(page: str, rows: list[dict]) -> str:
    """Returns the page with the table of these rows, our time over that of gesdd."""
    ratios = {(r["size"], r["spectrum"], r["rank"]): f"{r['over gesdd']:.2f}" for r in rows}
    lines = [
        [
            f"{size.replace('x', ' × ')}, {name}",
            *(ratios.get((size, name, k), "–") for k in COLUMNS),
        ]
        for size, name in dict.fromkeys(key[:2] for key in ratios)
    ]
    return fill_page(page, {"svd_table": format_table(["", *COLUMNS.values()], lines)})


def list_points(rows: list[dict]) -> list[list]:
    """[size, spectrum, columns over d, ratio] of every point of the figure."""
    shares = (row["columns"] / min(map(int, row["size"].split("x"))) for row in rows)
    return [
        [row["size"], row["spectrum"], round(share, 4), row["over gesdd"]]
        for row, share in zip(rows, shares, strict=True)
    ]


def draw_points(points: list[list], axes: Any) -> None:
    """Draws the time over that of gesdd by the share of columns kept, a colour a size."""
    for size in dict.fromkeys(point[0] for point in points):
        shares, ratios = zip(*(point[2:] for point in points if point[0] == size), strict=True)
        axes.scatter(shares, ratios, s=14, label=size.replace("x", " × "))
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(yscale="log", xlabel="columns kept, of all", ylabel="time over LAPACK's gesdd")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes.legend(loc="lower right", frameon=False, ncols=2)


def main() -> None:
    """Measures, prints, and writes after each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=ROWS)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--spectra", nargs="+", default=SPECTRA)
    parser.add_argument("--ranks", nargs="+", default=[str(rank) for rank in RANKS])
    given = parser.parse_args()
    facts = {"clock": given.clock, "threads": torch.get_num_threads(), "torch": torch.__version__}
    rows: list[dict] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    if given.page:
        PAGE.write_text(fill_table(PAGE.read_text("utf-8"), rows), "utf-8")
        return save_figure(FIGURE, list_points(rows), 3.2, draw_points)
    known = {(row["size"], row["spectrum"], row["rank"]) for row in rows}
    for size in given.sizes:
        m, n = map(int, size.split("x"))
        for name in given.spectra:
            ranks = [float(text) if "." in text else int(text) for text in given.ranks]
            missing = [rank for rank in ranks if (size, name, rank) not in known]
            if not missing:
                continue
            w = planted(m, n, make_values(name, min(m, n)))[0].float()
            for rank in missing:
                row = measure(w, rank, given.clock, given.rounds)
                rows.append({"size": size, "spectrum": name, **row})
                print(rows[-1], flush=True)
                given.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
