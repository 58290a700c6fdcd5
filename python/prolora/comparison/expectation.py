"""What share of training on the target each method is expected to give, from measured pairs.

The study in bench/quality trained LoRAs on pairs of small bases and measured what every method
recovers. A new pair gets the shares of the measured pairs that are near it in drift and spread,
weighted by a kernel; the interval holds the middle 80 % of them. Where no measured pair is near,
nothing is expected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

FILE = "calibration.json"
"""Made by bench/quality/calibrate.py, in this folder."""

LEAST_DRIFT = 0.01
"""Smaller drifts count as this one: what they change is too small to see."""

WANTS = ("look", "own")
"""What is asked of a moved LoRA: its effect in the target's look, or its own images."""


@dataclass(frozen=True)
class Expectation:
    """The expected share of what training on the target would give, for one method.

    Attributes:
        method: what is done.
        want: "look": the LoRA's effect in the target's look; "own": the LoRA's own images.
        share: the mean over measured pairs near this one; 1 is as good as training on the target,
            0 is useless, below 0 is harm.
        low: a tenth of the measured shares are below it.
        high: a tenth of them are above it.
        kinds: how many kinds of target are near this one.
        worlds: in which worlds they were measured.
    """

    method: str
    want: str
    share: float
    low: float
    high: float
    kinds: int
    worlds: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """When two pairs of bases are near each other.

    Attributes:
        drift: scale of the logarithm of the drift.
        spread: scale of the spread.
        tail: share of the weight that lies outside each end of an interval.
        reach: a pair farther than this from every measured one is unlike all of them.
    """

    drift: float
    spread: float
    tail: float
    reach: float

    def distance(self, ours: Mapping[str, Any], drift: float, spread: float) -> float:
        """How far a measured pair is from one of this drift and spread, in units of the scales."""
        logs = [math.log(max(x, LEAST_DRIFT)) for x in (ours["drift"], drift)]
        return math.hypot((logs[0] - logs[1]) / self.drift, (ours["spread"] - spread) / self.spread)


@dataclass(frozen=True)
class Calibration:
    """Measured pairs of bases, and how their shares are averaged.

    Attributes:
        made: when and from what.
        kernel: how pairs are weighted.
        checked: how intervals did on kinds that were left out.
        methods: name of a method -> its label in the study.
        pairs: "world", "arch", "kind", "seed", "drift", "cosine", "spread", and for each of WANTS
            that was measured {method: shares of the LoRAs}.
    """

    made: Mapping[str, Any]
    kernel: Kernel
    checked: Mapping[str, Any]
    methods: Mapping[str, str]
    pairs: Sequence[Mapping[str, Any]]

    @property
    def worlds(self) -> tuple[str, ...]:
        """The worlds of all pairs."""
        return tuple(dict.fromkeys(pair["world"] for pair in self.pairs))

    def expect(self, method: str, want: str, drift: float, spread: float) -> Expectation | None:
        """The expectation for a pair of bases; None where no pair like it was measured.

        Args:
            method: one of `methods`.
            want: one of WANTS.
            drift: ‖W_t − W_s‖/‖W_s‖.
            spread: see `Affinity.spread`.
        """
        measured = [pair for pair in self.pairs if pair.get(want, {}).get(method)]
        distances = [self.kernel.distance(pair, drift, spread) for pair in measured]
        if not distances or min(distances) > self.kernel.reach:
            return None
        counts: dict[tuple[str, ...], int] = {}
        for pair in measured:
            counts[_name_kind(pair)] = counts.get(_name_kind(pair), 0) + 1
        shares, weights, near = [], [], []
        for pair, distance in zip(measured, distances, strict=True):
            values = pair[want][method]
            # A kind with three seeds says no more about other kinds than one with a single seed.
            weight = math.exp(-(distance**2) / 2) / counts[_name_kind(pair)] / len(values)
            shares += values
            weights += [weight] * len(values)
            if distance <= self.kernel.reach:
                near.append(pair)
        weighted = (share * weight for share, weight in zip(shares, weights, strict=True))
        mean = math.fsum(weighted) / math.fsum(weights)
        tail = self.kernel.tail
        low, high = (find_quantile(shares, weights, level) for level in (tail, 1 - tail))
        kinds = {(pair["world"], pair["kind"]) for pair in near}
        worlds = tuple(dict.fromkeys(pair["world"] for pair in near))
        return Expectation(method, want, mean, low, high, len(kinds), worlds)


def _name_kind(pair: Mapping[str, Any]) -> tuple[str, ...]:
    return pair["world"], pair["arch"], pair["kind"]


def find_quantile(values: Sequence[float], weights: Sequence[float], level: float) -> float:
    """The value below which a share `level` of the weight lies, interpolated between values."""
    ordered = sorted((v, w) for v, w in zip(values, weights, strict=True) if w > 0)
    total, below, before = math.fsum(weights), 0.0, None
    for value, weight in ordered:
        middle = (below + weight / 2) / total
        if middle >= level:
            if before is None or middle == before[0]:
                return value
            part = (level - before[0]) / (middle - before[0])
            return before[1] + part * (value - before[1])
        before, below = (middle, value), below + weight
    return ordered[-1][0]


@cache
def load_calibration() -> Calibration:
    """The calibration that prolora ships."""
    text = resources.files(__package__).joinpath(FILE).read_text("utf-8")
    return read_calibration(json.loads(text))


def read_calibration(stored: Mapping[str, Any]) -> Calibration:
    """A calibration as bench/quality/calibrate.py writes it."""
    kernel = Kernel(**stored["kernel"])
    return Calibration(
        stored["made"], kernel, stored["checked"], stored["methods"], stored["pairs"]
    )


def expect_shares(drift: float, spread: float) -> tuple[Expectation, ...]:
    """What every measured method is expected to give on a pair of bases.

    Args:
        drift: ‖W_t − W_s‖/‖W_s‖ over the modules that matter.
        spread: over how many directions the drift is spread, see `Affinity.spread`.

    Returns:
        By method and want; empty where no pair like this was measured.
    """
    calibration = load_calibration()
    every = (
        calibration.expect(method, want, drift, spread)
        for want in WANTS
        for method in calibration.methods
    )
    return tuple(expectation for expectation in every if expectation is not None)
