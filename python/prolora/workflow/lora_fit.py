"""Where a LoRA lies between two bases: what drifted there, and what has a place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..adapters.formats.moves import Move, read_moves
from ..architectures.modules import find_block
from ..bases import Base
from ..comparison.comparison import Comparison
from ..comparison.drift import measure_affinities
from ..comparison.module_comparison import ModuleComparison
from ..core.affinity import Affinity
from ..core.verdict import STRANGE_COSINE
from .by_weights.ledger import Ledger
from .plan import ModulePlan


@dataclass(frozen=True)
class StackDrift:
    """The drift of a part of the target by depth."""

    name: str  # of the part: `transformer_blocks`, `down_blocks.1`
    drift: float  # ‖W_t − W_s‖/‖W_s‖ of all its weights
    cosine: float  # of all its weights
    blocks: tuple[str, ...]  # its transformer blocks, by number, or by name below the part
    drifts: tuple[float, ...]  # the drift of each block
    strangers: tuple[str, ...]  # blocks (or outside modules) with weights unlike their partners'
    # The share of the LoRA's energy that lies here; None without a LoRA
    energy: float | None = None


@dataclass(frozen=True)
class LoraFit:
    """Where a LoRA lies between two bases."""

    name: str  # of its file
    modules: int  # how many it has
    paired: int  # how many of them have a counterpart on the target
    reasons: Mapping[str, int]  # why others have none -> how many
    kept_energy: float  # the share of ‖ΔW‖² in modules with a counterpart
    drift: float  # root mean square of the modules' drift, weighted by the LoRA's energy
    stranger_energy: float  # the share of ‖ΔW‖² in pairs of weights that have nothing in common
    # What prolora did to it before: from which base to which, oldest first
    moves: tuple[Move, ...] = ()

    def sentence(self, bases_drift: float) -> str:
        """Writes the fit in plain words; `bases_drift` covers all modules."""
        text = (
            f"{self.paired} of the LoRA's {self.modules} modules have a place on the target, with "
            f"{self.kept_energy:.0%} of its energy. Where its energy lies the bases differ by "
            f"{self.drift:.2g} of their norm, over all modules by {bases_drift:.2g}."
        )
        if self.stranger_energy > 0:
            text += (
                f" {self.stranger_energy:.0%} of it lies in weights that have nothing in common "
                "with their partners."
            )
        for reason, count in self.reasons.items():
            text += f" {count} without a place: {reason}."
        return text


def describe_stack(
    name: str, modules: Sequence[ModuleComparison], energies: Mapping[str, float] | None
) -> StackDrift:
    """Describes the drift of one part of the target.

    `energies` is target module -> share of the LoRA's energy; None without a LoRA.
    """
    blocks: dict[str, list[Affinity]] = {}
    strange: dict[str, None] = {}
    for module in modules:
        block = find_block(module.target)
        label = f"{block.stack}.{block.number}" if block else module.target
        label = label.removeprefix(f"{name}.")
        if block:
            blocks.setdefault(label, []).append(module.affinity)
        if module.cosine < STRANGE_COSINE:
            strange[label] = None
    total = Affinity.total(module.affinity for module in modules)
    drifts = tuple(Affinity.total(parts).drift for parts in blocks.values())
    energy = None
    if energies is not None:
        energy = sum(energies.get(module.target, 0.0) for module in modules)
    return StackDrift(
        name, total.drift, total.cosine, tuple(blocks), drifts, tuple(strange), energy
    )


def measure_plan(
    plan: ModulePlan, comparison: Comparison, source: Base, target: Base
) -> dict[str, Affinity]:
    """Returns target module -> affinity of the LoRA's pairs; reads missing ones."""
    known = {module.target: module.affinity for module in comparison.modules}
    places = [(pair.source, pair.target) for pair in plan.pairs]
    missing = [p for p in places if p[1] not in known]
    measured = measure_affinities(source, target, missing)
    known |= {module: a for (_, module), a in zip(missing, measured, strict=True)}
    return {module: known[module] for _, module in places if module in known}


def locate_lora(
    ledger: Ledger, affinities: Mapping[str, Affinity], name: str
) -> tuple[LoraFit, dict[str, float]]:
    """Locates a planned LoRA; also returns target module -> share of energy."""
    plan, unread = ledger.plan, ledger.adapter.unread
    energies = {r.source: r.energy for r in ledger.rows.values() if r.source not in unread}
    total = sum(energies.values()) or 1.0
    placed = {pair.target: energies[pair.source] / total for pair in plan.pairs}
    sources = {pair.source for pair in plan.pairs} | set(plan.passed)
    kept = sum(energies[module] for module in sources) / total
    weights = {module: placed[module] for module in affinities}
    weighed = sum(weights.values()) or 1.0
    squares = (affinities[m].drift ** 2 * w for m, w in weights.items() if w > 0)
    reasons: dict[str, int] = {}
    for reason in (*plan.skipped.values(), *plan.refused.values()):
        reasons[reason] = reasons.get(reason, 0) + 1
    strange = sum(w for m, w in weights.items() if affinities[m].cosine < STRANGE_COSINE)
    fit = LoraFit(
        name,
        len(energies),
        len(sources),
        reasons,
        kept,
        (sum(squares) / weighed) ** 0.5,
        strange,
        read_moves(ledger.adapter.metadata),
    )
    return fit, placed
