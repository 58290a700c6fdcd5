"""What share of training on the target each method is expected to give, from measured pairs.

The study in bench/quality trained LoRAs on pairs of small bases and measured what every method
recovers. Pairs fall into a few classes, by what their weights show; the interval of a class holds
80 % of what was measured there, and is widened by what one world of the study missed in another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ..core.verdict import FARTHEST, Verdict

FILE = "calibration.json"
"""Made by bench/quality/calibrate.py, in this folder."""

ALIKE_RATIO = 0.4
"""Bases whose drift is a smaller part of the LoRA's own size are alike, whatever it looks like."""

ALIKE_DRIFT = 0.06
"""The same of bases that are judged without a LoRA: 0.4 times the usual size of measured ones."""

ALIKE_SPREAD = 0.45
"""From this spread on, too; targets of another look were seen up to 0.43."""

MEASURED_DRIFT = 1.3
"""Of related bases that differ by more none was measured, nor any that are no go."""

WANTS = ("look", "own")
"""What is asked of a moved LoRA: its effect in the target's look, or its own images."""

APART, DISTANT, CUT, ALIKE, CHANGED = "apart", "distant", "cut", "alike", "changed"
"""Trained apart; apart from one start, or distilled for long; without some of the LoRA's blocks;
trained on, merged or distilled; with a look of its own."""


@dataclass(frozen=True)
class Expectation:
    """The expected share of what training on the target would give, for one method.

    Attributes:
        method: what is done.
        want: "look": the LoRA's effect in the target's look; "own": the LoRA's own images.
        share: the mean over measured pairs of this class; 1 is as good as training on the target,
            0 is useless, below 0 is harm.
        low: a tenth of the shares of a world that was not measured are expected below it.
        high: a tenth of them are expected above it.
        kinds: how many kinds of target were measured in this class.
        worlds: in which worlds.
    """

    method: str
    want: str
    share: float
    low: float
    high: float
    kinds: int
    worlds: tuple[str, ...]


def classify(verdict: Verdict, cut: bool) -> str:
    """The class of a pair of bases.

    Args:
        verdict: by their weights.
        cut: whether modules of the LoRA have no place on the target.
    """
    if not verdict.related:
        return APART
    if verdict.drift > FARTHEST:
        return DISTANT
    if cut:
        return CUT
    limit = ALIKE_RATIO * verdict.size if verdict.size else ALIKE_DRIFT
    return ALIKE if verdict.drift < limit or verdict.spread >= ALIKE_SPREAD else CHANGED


@cache
def load_calibration() -> Mapping[str, Any]:
    """The calibration that prolora ships: "made", "checked" and "expected"."""
    text = resources.files(__package__).joinpath(FILE).read_text("utf-8")
    stored: Mapping[str, Any] = json.loads(text)
    return stored


def expect_shares(verdict: Verdict, cut: bool = False) -> tuple[Expectation, ...]:
    """What every measured method is expected to give on a pair of bases, by method and want.

    Args:
        verdict: by their weights.
        cut: whether modules of the LoRA have no place on the target.

    Returns:
        Empty where no pair like this was measured.
    """
    if verdict.related and not (verdict.go and verdict.drift <= MEASURED_DRIFT):
        return ()
    entries = load_calibration()["expected"][classify(verdict, cut)]
    return tuple(Expectation(**entry | {"worlds": tuple(entry["worlds"])}) for entry in entries)
