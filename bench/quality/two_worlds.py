"""Tables that hold both worlds side by side, kind of target by kind of target."""

from __future__ import annotations

from results import COPIES, Table, best
from tables import format_table

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
}


def order_kinds(table: Table) -> list[str]:
    """The kinds of a table in the order of PRACTICE."""
    kinds = {row["kind"] for row in table.rows}
    return [kind for kind in PRACTICE if kind in kinds]


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
