"""Tables that hold both worlds side by side, kind of target by kind of target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from results import COPIES, Table, best, recovered
from tables import format_cell, format_table

WORKS, FAILS = 0.25, 0.1
"""A transfer worked if it recovers more than the first, and failed if less than the second."""

PRACTICE = {
    "near": "a light fine-tune",
    "continued": "trained on, same kind of images",
    "continued, long": "the same, 2.5 times as long",
    "merged 1": "one LoRA merged in",
    "merged 3": "three LoRAs merged in",
    "merged 10": "ten LoRAs merged in",
    "blended": "weighted mean of two fine-tunes",
    "few-step": "4-step student without guidance",
    "guided": "guidance distilled in",
    "pruned": "blocks cut out, then distilled",
    "renumbered": "the same, and blocks renumbered",
    "deepened": "new blocks put in",
    "sibling": "from one fine-tune to another",
    "far": "another art style or domain",
    "far, long": "the same, three times as long",
    "far ground": "another ground",
    "independent": "trained from the start elsewhere",
    "resized": "other width and depth",
}
"""Kind -> what users have of it, in the order of the tables."""

BASELINES = {
    "copy": "copy @ 1",
    "norm": "norm-matched @ 1",
    "extracted": "extracted @ 1",
    "CASA": "casa @ 1",
    "`lora-x`": "lora-x 0.9 @ 1",
    "`prolora`": "prolora 0.99 @ 1",
    "`blocks`": "blocks 0.9 @ 1",
    "**auto**": "auto",
}


def by_own_images(table: Table) -> Table:
    """The rows by the second yardstick; those of targets that look like the source have one.

    A few-step adapter has no images of its own.
    """
    rows = [row for row in table.rows if row["adapter"] != "fewstep"]
    return Table([row | row.get("own", {}) for row in rows])


def order_kinds(table: Table) -> list[str]:
    """The kinds of a table in the order of PRACTICE."""
    kinds = {row["kind"] for row in table.rows}
    return [kind for kind in PRACTICE if kind in kinds]


def kinds_table(tables: Mapping[str, Table]) -> str:
    """Copies and `auto` on every kind of target, by both yardsticks."""
    lines = []
    for kind in PRACTICE:
        for world, table in tables.items():
            part = table.where(kind=kind)
            sticks = [("look", part)]
            if any("own" in row for row in part.rows):
                sticks.append(("own", by_own_images(part)))
            for stick, rows in sticks:
                if rows.rows and rows.share("copy @ 1"):
                    lines.append([kind, world, stick, *_compare_copies(rows)])
    head = [
        "target",
        "world",
        "judged by",
        "copy at 1",
        "copy at its best",
        "auto",
        "auto − copy at 1",
        "auto − best copy",
    ]
    return format_table(head, lines)


def _compare_copies(rows: Table) -> list[str]:
    """What copies and `auto` recover, and the differences."""
    fixed = rows.best_copy()
    shares = [format_cell(rows.share(label)) for label in ("copy @ 1", fixed, "auto")]
    shares[1] += f" at {fixed.removeprefix('copy @ ')}"
    return [*shares, *(format_cell(rows.difference("auto", x)) for x in ("copy @ 1", fixed))]


def baselines_table(table: Table) -> str:
    """Every baseline on every kind, means alone."""
    lines = []
    for kind in order_kinds(table):
        part = table.where(kind=kind)
        if not part.share("copy @ 1"):
            continue
        labels = [*BASELINES.values(), best(part, COPIES), "ceiling"]
        means = [part.share(label) for label in labels]
        lines.append([kind, *("–" if mean is None else f"{mean[0]:.2f}" for mean in means)])
    return format_table(["", *BASELINES, "best copy", "*ceiling*"], lines)


def targets_table(tables: Mapping[str, Table]) -> str:
    """How `auto` stands to the copies over all kinds, and on the worst one."""
    lines = []
    for world, table in tables.items():
        for stick, rows in (("look", table), ("own", by_own_images(table))):
            parts = {kind: rows.where(kind=kind) for kind in order_kinds(rows)}
            parts = {k: p for k, p in parts.items() if p.share("copy @ 1") and k != "independent"}
            if not parts or (stick == "own" and not any("own" in row for row in rows.rows)):
                continue
            lines.append([world, stick, *_worst(parts, lambda part: "copy @ 1")])
            lines[-1] += _worst(parts, lambda part: part.best_copy())
    head = ["world", "judged by", "auto − copy at 1, mean", "worst kind"]
    return format_table([*head, "auto − best copy, mean", "worst kind"], lines)


def _worst(parts: Mapping[str, Table], other: Callable[[Table], str]) -> list[str]:
    """The mean over kinds of `auto` less another method, and the kind where it is least."""
    means = {k: p.difference("auto", other(p)) for k, p in parts.items()}
    known = {k: m for k, m in means.items() if m}
    least = min(known, key=lambda k: known[k][0])
    mean = sum(m[0] for m in known.values()) / len(known)
    return [f"{mean:+.3f}", f"{known[least][0]:+.2f} ({least})"]


def decisions_table(tables: Mapping[str, Table]) -> str:
    """False-go and false-no-go counts over every scored target and adapter, by the look."""
    lines = []
    for world, table in tables.items():
        judged = [r for r in table.rows if r["verdict"] and recovered(r, "copy @ 1") is not None]
        go = [row for row in judged if row["verdict"]["go"]]
        stopped = [row for row in judged if not row["verdict"]["go"]]
        failed = [row for row in go if (recovered(row, "auto") or 0) < FAILS]
        labels = [*(f"damped, κ {kappa}" for kappa in (1, 2, 4, 8, 16, 32)), *COPIES]
        missed = [r for r in stopped if max(recovered(r, x) or 0 for x in labels) > WORKS]
        for name, some, every in (("go", failed, go), ("no-go", missed, stopped)):
            where = ", ".join(sorted({f"{row['adapter']} on {row['kind']}" for row in some}))
            share = f"{len(some) / len(every):.1%}" if every else "–"
            lines.append([world, f"false {name}", f"{len(some)} of {len(every)}", share, where])
    return format_table(["world", "", "rows", "rate", "which"], lines)
