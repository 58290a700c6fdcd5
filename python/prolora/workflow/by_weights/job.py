"""One LoRA between the stages of a transfer by weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ...adapters.adapter import Adapter
from ...bases.base import Progress
from ...comparison.drift import Affinity
from ...comparison.verdict import Verdict
from ..options import TransferOptions
from ..plan import ModulePlan, Pair
from .lora_work import LoraWork


@dataclass
class Job:
    """One LoRA on its way, between the stages of a transfer.

    Attributes:
        adapter: as it was read; updates without a place have no values any more.
        plan: where its modules go.
        asked: the options, before anything was decided.
        work: what is moved, and what has been.
        energies: ‖ΔW_s‖² of the modules without a place, and of those that were sliced.
        prepare: reads and plans the LoRA anew, with other options.
        affinities: target module -> affinity of its pair of weights.
        verdict: on the pair of bases; None where no weight is moved.
        strangers: pairs that `auto` left out of the plan, as their weights have nothing in common.
    """

    adapter: Adapter
    plan: ModulePlan
    asked: TransferOptions
    work: LoraWork
    energies: dict[str, float]
    prepare: Callable[[TransferOptions], Job]
    affinities: dict[str, Affinity] = field(default_factory=dict)
    verdict: Verdict | None = None
    strangers: list[Pair] = field(default_factory=list)


def label_stage(what: str, progress: Progress | None) -> Progress | None:
    """The caller's callback; it is told what is done to weights that are not yet moved."""
    if progress is None:
        return None
    return lambda done, total, name: progress(done, total, f"{what} {name}")
