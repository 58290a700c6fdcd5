"""The plots of docs/evidence.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results import COPIES, Table, best, recovered

RELATED = ("near", "far", "pruned", "continued")
BARS = {
    "copy, strength 1": ("copy @ 1", "#9aa5b1"),
    "copy, best fixed": ("", "#52606d"),
    "auto": ("auto", "#c2410c"),
    "blocks": ("blocks 0.9 @ 1", "#7fb3a3"),
    "prolora": ("prolora 0.9 @ 1", "#2b6cb0"),
    "lora-x": ("lora-x 0.9 @ 1", "#90cdf4"),
}
COLOURS = {
    "near": "#2f855a",
    "far": "#c2410c",
    "pruned": "#2b6cb0",
    "continued": "#6b46c1",
    "independent": "#1a202c",
}


def draw(table: Table, folder: Path) -> None:
    """Every plot, as SVG."""
    plt.rcParams.update({"svg.hashsalt": "prolora", "font.size": 9})
    for name, figure in (("methods", _methods), ("verdicts", _verdicts), ("ranks", _ranks)):
        plot = figure(table)
        plot.savefig(folder / f"evidence-{name}.svg", metadata={"Date": None})
        plt.close(plot)


def _methods(table: Table) -> plt.Figure:
    """What each method recovers, with intervals."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    width = 0.8 / len(BARS)
    for i, (name, (label, colour)) in enumerate(BARS.items()):
        for j, kind in enumerate((*RELATED, "independent")):
            part = table.where(kind=kind)
            mean = part.share(label or part.best_copy())
            if mean is None:
                continue
            low, high = mean[0] - mean[1], mean[2] - mean[0]
            axes.bar(
                j + (i - len(BARS) / 2 + 0.5) * width,
                mean[0],
                width,
                color=colour,
                yerr=[[low], [high]],
                error_kw={"lw": 0.8},
                label=name if j == 0 else None,
            )
    axes.set_xticks(range(len(RELATED) + 1), (*RELATED, "independent"))
    axes.set_ylabel("share of the gap recovered")
    axes.axhline(0, color="black", lw=0.8)
    axes.legend(ncols=3, fontsize=8, loc="upper right")
    axes.set_ylim(-0.3, 1.25)
    return figure


def _verdicts(table: Table) -> plt.Figure:
    """What the weights say before, against what a transfer recovers."""
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    seen = set()
    for row in table.rows:
        verdict = row["verdict"]
        if not verdict:
            continue
        part = Table([row])
        share = recovered(row, best(part, ("damped, κ 4", "damped, κ 1", "copy @ 1")))
        kind = row["kind"] if row["kind"] in COLOURS else "other fine-tunes"
        axes.scatter(
            verdict["kappa"] if verdict["cosine"] > 0.5 else 8,
            max(share or 0, -0.3),
            s=14,
            color=COLOURS.get(kind, "#d69e2e"),
            marker="o" if verdict["go"] else "x",
            label=None if kind in seen else kind,
            linewidths=1,
        )
        seen.add(kind)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlabel("κ of the weights (unrelated bases drawn at 8); ○ go, × no-go")
    axes.set_ylabel("best of copy and damped")
    axes.legend(fontsize=8)
    return figure


def _ranks(table: Table) -> plt.Figure:
    """What prolora recovers as its subspaces grow, beside the copy."""
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    rules = {rule: f"prolora {rule} @ 1" for rule in ("0.5", "0.8", "0.9", "0.99")}
    for kind in RELATED:
        part = table.where(kind=kind)
        means = [part.share(label) for label in rules.values()]
        means.append(part.share("copy @ 1"))
        points = [(i, mean) for i, mean in enumerate(means) if mean]
        axes.errorbar(
            [i for i, _ in points],
            [mean[0] for _, mean in points],
            marker="o",
            ms=4,
            label=kind,
            yerr=[[m[0] - m[1] for _, m in points], [m[2] - m[0] for _, m in points]],
            color=COLOURS[kind],
            capsize=2,
            lw=1.2,
        )
    axes.set_xticks(range(len(rules) + 1), (*(f"energy {rule}" for rule in rules), "copy"))
    axes.set_ylabel("share of the gap recovered")
    axes.legend(fontsize=8, ncols=4)
    return figure


__all__ = ["COPIES", "draw"]
