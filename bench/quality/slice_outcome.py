"""What a slice found on one target, and how an order of methods is checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One target of a slice.

    Attributes:
        title: the target, and what was decided about it.
        shares: method -> share of the gap that it recovers.
        faults: what differs from the study, a sentence each.
    """

    title: str
    shares: Mapping[str, float]
    faults: list[str]


def misplaced(
    shares: Mapping[str, float], pairs: Iterable[tuple[str, str]], margin: float
) -> list[str]:
    """A sentence for every (better, worse) pair whose better method is not ahead by the margin."""
    return [
        f"{better} ({shares[better]:.2f}) not above {worse} ({shares[worse]:.2f})"
        for better, worse in pairs
        if not shares[better] >= shares[worse] + margin
    ]
