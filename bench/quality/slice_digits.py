"""The slice of the digits, trained from nothing in some minutes.

It has small transformers, one style, one seed and a quarter of the study's training; the margins
are wide enough for other processors to reproduce the order, not the figures.

The style is the slanted one, whose strength matters most. With the thick one `auto` stays about 0.1
below the best copy on far fine-tunes of the transformer (docs/evidence.md): more than LEVEL.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from lessons import make_lesson
from results import Outcome, misplaced
from scoring import Yardstick, apply_updates, cases, chosen_rows, loss_rows
from training import train_base, train_lora
from world_side import fit_lora
from worlds import World, load_world

from prolora import fitting as probe

BUDGET = {
    "source": (600, 2e-3),
    "far": (150, 1e-3),
    "pruned": (150, 1e-3),
    "independent": (400, 2e-3),
    "lora": (80, 3e-3),
}
ADAPTER = "slanted"
# Best first: each recovers at least MARGIN more of the gap than the next.
ORDER = {
    "far": ("prolora 0.9 @ 1", "subspace 0.9 @ 1"),
    "pruned": ("auto", "prolora 0.9 @ 1", "subspace 0.9 @ 1"),
}
MARGIN = 0.02
PROBED = 0.3
"""What probing recovers at least of an unrelated base, in a fifth of its usual budget."""


def recovered(
    world: World, kind: str, source: torch.nn.Module, lora: dict
) -> tuple[dict[str, float], bool, str]:
    """Share of the gap that each method recovers on a new target, and the verdicts on it."""
    target = train_base(world, "flux", kind, 0, source)
    cases_by_adapter = cases(world, "flux", kind, source, target, {ADAPTER: lora})
    taught, judged = (make_lesson(world, kind, ADAPTER, target, s) for s in ("train", "held_out"))
    oracle = train_lora(world, "flux", ADAPTER, 0, target, taught)
    prefix, look = world.prefix["flux"], Yardstick({ADAPTER: judged}, {ADAPTER: oracle})
    row = loss_rows(target, cases_by_adapter, look)[ADAPTER]
    chosen = chosen_rows(target, cases_by_adapter, look)[ADAPTER]
    gap = row["none"] - row["oracle"]
    losses = row["losses"] | chosen["losses"]
    decision = ""
    if kind in ("far", "independent"):
        fitted = fit_lora(
            world,
            (source, target),
            {f"{prefix}{n}": u for n, u in lora.items()},
            ADAPTER,
            probe.FitSettings(
                images=12, steps=10, fit_steps=12, probes=240, held_out=90, force=True
            ),
        )
        decision = fitted.report.gate.decision
        updates = {n.removeprefix(prefix): u for n, u in fitted.scaled.items()}
        with apply_updates(target, updates):
            losses["probe"] = judged.held_out(target)
    shares = {label: (row["none"] - loss) / gap for label, loss in losses.items()}
    return shares, chosen["verdict"]["related"], decision


def faults(kind: str, shares: dict[str, float], go: bool, decision: str) -> list[str]:
    """What differs from the results of the study."""
    if kind == "independent":
        worked = [label for label, share in shares.items() if share > 0.1 and label != "probe"]
        faults_seen = [
            f"{label} recovers {shares[label]:.2f} of an unrelated base" for label in worked
        ]
        if not shares["probe"] >= PROBED or decision != "go":
            faults_seen.append(
                f"probing ({decision}) recovers {shares['probe']:.2f} of an unrelated base"
            )
        return [*faults_seen, *(["an unrelated base is called a go"] if go else [])]
    faults_seen = [] if go else ["a related base is called a no-go"]
    lost = shares["copy @ 1"] - shares.get("probe", shares["copy @ 1"])
    if kind == "far" and decision not in ("refuse", "copy") and lost > MARGIN:
        faults_seen.append(f"probing calls a far fine-tune a {decision}, {lost:.2f} below the copy")
    faults_seen += misplaced(shares, itertools.pairwise(ORDER[kind]), MARGIN)
    if abs(shares["auto"] - shares["copy @ 1"]) > 1e-3:
        faults_seen.append(f"auto ({shares['auto']:.2f}) is not the copy")
    return faults_seen


def run() -> Iterator[Outcome]:
    """Every target of the slice."""
    world = load_world("digits")
    world = dataclasses.replace(world, budgets=world.budgets | BUDGET)
    source = train_base(world, "flux", "source", 0, None)
    taught = make_lesson(world, "source", ADAPTER, source, "train")
    lora = train_lora(world, "flux", ADAPTER, 0, source, taught)
    for kind in (*ORDER, "independent"):
        shares, go, decision = recovered(world, kind, source, lora)
        note = f", probing: {decision}" if decision else ""
        title = f"{kind} ({'go' if go else 'no-go'}{note})"
        yield Outcome(title, shares, faults(kind, shares, go, decision))
