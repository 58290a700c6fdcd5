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
    """The drift of a part of the target by depth.

    Attributes:
        name: of the part: `transformer_blocks`, `down_blocks.1`.
        drift: ‖W_t − W_s‖/‖W_s‖ of all its weights.
        cosine: of all its weights.
        blocks: its transformer blocks, by number, or by name below the part.
        drifts: the drift of each block.
        strangers: blocks (or modules outside of all) with weights that have nothing in common with
            their partners.
        energy: the share of the LoRA's energy that lies here; None without a LoRA.
    """

    name: str
    drift: float
    cosine: float
    blocks: tuple[str, ...]
    drifts: tuple[float, ...]
    strangers: tuple[str, ...]
    energy: float | None = None


@dataclass(frozen=True)
class LoraFit:
    """Where a LoRA lies between two bases.

    Attributes:
        name: of its file.
        modules: how many it has.
        paired: how many of them have a place on the target.
        reasons: why others have none -> how many.
        kept_energy: the share of ‖ΔW‖² in modules that have a place.
        drift: root mean square of the modules' drift, weighted by the LoRA's energy.
        stranger_energy: the share of ‖ΔW‖² in pairs of weights that have nothing in common.
        moves: what prolora did to it before: from which base to which, oldest first.
    """

    name: str
    modules: int
    paired: int
    reasons: Mapping[str, int]
    kept_energy: float
    drift: float
    stranger_energy: float
    moves: tuple[Move, ...] = ()

    def sentence(self, bases_drift: float) -> str:
        """In plain words; `bases_drift` is that of all modules."""
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
    """The drift of one part of the target.

    Args:
        name: of the part.
        modules: the pairs of weights in it.
        energies: target module -> share of the LoRA's energy; None without a LoRA.
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
    """Target module -> affinity, of the LoRA's pairs; those that no comparison has are read."""
    known = {module.target: module.affinity for module in comparison.modules}
    places = [(pair.source, pair.target) for pair in plan.pairs]
    missing = [p for p in places if p[1] not in known]
    measured = measure_affinities(source, target, missing)
    known |= {module: a for (_, module), a in zip(missing, measured, strict=True)}
    return {module: known[module] for _, module in places if module in known}


def locate_lora(
    ledger: Ledger, affinities: Mapping[str, Affinity], name: str
) -> tuple[LoraFit, dict[str, float]]:
    """Where a planned LoRA lies, and target module -> share of its energy."""
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
