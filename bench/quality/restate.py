"""What `auto` gives under a newer rule, where models are no longer there: ``python restate.py``.

The rule of the verdict chooses a damping and a strength. Losses at several dampings and strengths
were measured, and vary smoothly between them, so the loss at others is interpolated: the rule
changed after the models had been trained and scored.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from evidence import results_of
from results import round_numbers
from worlds import NAMES

from prolora import Verdict
from prolora.core.verdict import MIN_DAMPING

STRENGTHS = (0.25, 0.4, 0.6, 0.8, 1.0, 1.25)
NOTE = "interpolated between the dampings and strengths that were measured"


def loss_at_damping(losses: dict[str, float], kappa: float) -> float:
    """The loss of `damped`: the polynomial in log(1 + κ) through the measured ones."""
    known = {0.0: losses["copy @ 1"]}
    known |= {
        float(label.removeprefix("damped, κ ")): loss
        for label, loss in losses.items()
        if label.startswith("damped, κ ")
    }
    places = sorted(known)
    steps = [math.log1p(place) for place in places]
    curve = np.polyfit(steps, [known[place] for place in places], len(places) - 1)
    return float(np.polyval(curve, math.log1p(kappa)))


def loss_at_strength(losses: dict[str, float], method: str, strength: float) -> float:
    """The loss of a method at a strength, a parabola through the three nearest measured ones."""
    near = sorted(sorted(STRENGTHS, key=lambda s: abs(s - strength))[:3])
    parabola = np.polyfit(near, [losses[f"{method} @ {s:g}"] for s in near], 2)
    return float(np.polyval(parabola, strength))


def restate_row(row: dict[str, Any]) -> None:
    """Gives a scored row the verdict of today's rule, and what follows from it."""
    if not row["verdict"]:
        return
    verdict = Verdict(*(row["verdict"][name] for name in ("drift", "cosine", "spread")))
    names = ("drift", "cosine", "spread", "go", "strength", "kappa")
    row["verdict"] = {name: getattr(verdict, name) for name in names}
    if not verdict.related:  # `auto` writes nothing
        return
    for scored in (row, row.get("own")):
        if scored and "copy @ 1" in scored["losses"]:
            restate_losses(scored["losses"], verdict)


def restate_losses(losses: dict[str, float], verdict: Verdict) -> None:
    """What `auto` and the automatic strengths give by one yardstick."""
    kappa = verdict.kappa if verdict.kappa >= MIN_DAMPING else 0.0
    losses["auto"] = loss_at_damping(losses, kappa)
    for method, label in (("copy", "copy"), ("blocks 0.9", "blocks")):
        named = f"{label}, automatic strength"
        if not all(f"{method} @ {s:g}" in losses for s in STRENGTHS):
            continue
        losses[named] = loss_at_strength(losses, method, verdict.strength)


def main() -> None:
    for world in NAMES:
        path = results_of(world)
        results = json.loads(path.read_text())
        for row in results["rows"]:
            restate_row(row)
        results["made"]["auto"] = NOTE
        results["rows"] = [round_numbers(row) for row in results["rows"]]
        path.write_text(json.dumps(results, indent=0) + "\n")


if __name__ == "__main__":
    main()
