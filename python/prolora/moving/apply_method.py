"""One method applied to a stack of updates, with rows.

A pair is skipped here if its weights overlap less than the threshold on Φ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..comparison.overlap import Alignment
from ..core.basis import Basis
from ..core.lowrank import LowRank
from ..core.projection import project_factors
from ..reports.module_report import Measures
from .ledger import Ledger, Moved
from .plan import Pair


def copy_updates(ledger: Ledger) -> list[Moved]:
    """Returns the updates unchanged."""
    updates, what = ledger.adapter.updates, ledger.method.outcome
    return [Moved(pair, updates[pair.source], what) for pair in ledger.plan.pairs]


def project_updates(
    ledgers: list[Ledger],
    stack: list[Pair],
    places: list[int],
    source: Basis,
    target: Basis,
    aligned: Alignment,
) -> list[Moved]:
    """Projects and recompresses updates; skips pairs with Φ below the threshold.

    Args:
        ledgers: LoRAs with one rank at these indices.
        stack: pairs of one shape.
        places: indices of some of them.
        source: bases of the source's weights, one for every pair of the stack.
        target: bases of the target's weights.
        aligned: what the two have in common.
    """
    options, pairs = ledgers[0].options, [stack[i] for i in places]
    source, target, aligned = source.take(places), target.take(places), aligned.take(places)
    projected = project_factors(
        _stack_updates(ledgers, pairs), source, target, options.method, aligned.similar
    )
    info, recompressed = projected.info, projected.recompressed()
    rungs = ["+".join(sorted(set(both))) for both in zip(source.rungs, target.rungs, strict=True)]
    measured = Measures.of(info, rungs, aligned.angles_left, aligned.angles_right)
    numbers = [
        x.flatten().tolist()
        for x in (info.energy, info.surviving_energy, info.norm_ratio, info.copy_distance)
    ]
    moved_updates: list[Moved] = []
    for first, ledger in enumerate(ledgers):
        for i, pair in enumerate(pairs):
            at = i * len(ledgers) + first
            measures = measured[at]
            skipped = _explain_overlap(measures, options.threshold)
            update = None if skipped else recompressed[at]
            what = skipped or ledger.method.outcome
            energy, surviving, ratio, distance = (values[at] for values in numbers)
            moved_updates.append(
                Moved(pair, update, what, energy, surviving, ratio, distance, measures)
            )
    return moved_updates


def _explain_overlap(measures: Measures, threshold: float) -> str:
    """Explains why a pair with too little overlap is skipped; "" for others."""
    if not min(measures.phi_left, measures.phi_right) < threshold:
        return ""
    side = "left" if measures.phi_left <= measures.phi_right else "right"
    return f"Φ {side} below the threshold {threshold:g}"


def _stack_updates(ledgers: list[Ledger], pairs: list[Pair]) -> LowRank:
    """Stacks the source's updates of several LoRAs.

    They are [b, l, m, r] and [b, l, r, n].
    """
    updates = [ledger.adapter.updates[pair.source] for pair in pairs for ledger in ledgers]
    device = ledgers[0].options.device

    def stack(factors: list[Tensor]) -> Tensor:
        stacked: Tensor = torch.stack(factors).to(device).unflatten(0, (len(pairs), len(ledgers)))
        return stacked

    return LowRank(stack([x.up for x in updates]), stack([x.down for x in updates]))
