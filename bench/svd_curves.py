"""What truncated_svd costs against size, columns, batch and number of layers: JSON and a picture.

    python bench/svd_curves.py OUT                 # wall time, on an idle machine
    python bench/svd_curves.py OUT --clock cpu     # processor time, on a busy one
    python bench/svd_curves.py OUT --quick         # small sizes, to see that it runs

Beside every time stand those of torch.linalg.svd and of eigh on the Gram matrix, taken in turn with
it, all in float32 on the weights of bench/test_svd.py; beside every result its error, against
LAPACK in float64, and its bound. Processor time is that of all threads: what other processes take
does not enter it, and neither does what threads gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import matplotlib
import torch
from test_svd import sine, weights

import prolora

CURVES = {
    "n": [(1, n, n, n // 8) for n in (320, 512, 768, 1024, 1280, 1536, 2048)],
    "k": [(1, 1280, 1280, k) for k in (16, 32, 64, 96, 128, 160, 240, 320, 480, 640)],
    "batch": [(b, 320, 320, 160) for b in (1, 2, 4, 8, 16)],
    "layers": [(b, 768, 768, 96) for b in (1, 2, 4, 6)],
}
SERIES = ("truncated_svd", "torch.linalg.svd", "gram + eigh")


def measured(case: tuple[int, int, int, int], clock: str, rounds: int) -> dict[str, object]:
    """Milliseconds of each series for one case, with error and bound."""
    b, m, n, k = case
    w = weights(b, m, n, "cpu")
    now = time.process_time if clock == "cpu" else time.perf_counter
    jobs = (
        lambda: prolora.truncated_svd(w, k),
        lambda: torch.linalg.svd(w, full_matrices=False),
        lambda: torch.linalg.eigh(w @ w.mT),
    )
    taken: list[list[float]] = [[] for _ in jobs]
    for _ in range(rounds):
        for job, times in zip(jobs, taken, strict=True):
            start = now()
            job()
            times.append(1e3 * (now() - start))
    basis = prolora.truncated_svd(w, k)
    exact = torch.linalg.svd(w[0].double(), full_matrices=False)[0]
    times = {name: statistics.median(t) for name, t in zip(SERIES, taken, strict=True)}
    return {
        "batch": b,
        "m": m,
        "n": n,
        "k": k,
        "rung": basis.rung,
        "ms": {name: round(value, 2) for name, value in times.items()},
        "ratio": round(times[SERIES[0]] / times[SERIES[1]], 3),
        "sine": sine(exact, basis.U, k),
        "bound": float(basis.bound.max()),
    }


def draw(curves: dict[str, list[dict]], clock: str, path: Path) -> None:
    """A panel for each curve."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6))
    labels = {
        "n": "size n, k = n/8",
        "k": "columns k of 1280²",
        "batch": "matrices of 320², k = 160",
        "layers": "layers of 768², k = 96",
    }
    for panel, (name, rows) in zip(panels, curves.items(), strict=True):
        x = [row["batch" if name in ("batch", "layers") else name] for row in rows]
        for series in SERIES:
            panel.plot(x, [row["ms"][series] for row in rows], marker="o", ms=3, label=series)
        panel.set(xlabel=labels[name], xscale="log", yscale="log")
        panel.set_xticks(x, [str(value) for value in x], rotation=60, fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"ms of {'processor' if clock == 'cpu' else 'wall'} time")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    curves: dict[str, list[dict]] = {}
    for name, cases in CURVES.items():
        curves[name] = []
        for case in cases[: 2 if arguments.quick else None]:
            row = measured(case, arguments.clock, 1 if arguments.quick else arguments.rounds)
            print(name, row, flush=True)
            curves[name].append(row)
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "clock": arguments.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "curves": curves,
    }
    (arguments.out / "truncated_svd_curves.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(curves, arguments.clock, arguments.out / "truncated_svd_curves.png")


if __name__ == "__main__":
    main()
