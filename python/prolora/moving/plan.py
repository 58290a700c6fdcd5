"""The target of every LoRA module, from names and shapes alone.

No weight is read here. Every module of the adapter ends in the plan exactly once: as a pair, as
skipped with the reason, or as refused with the reason. Three reasons to skip arise elsewhere: an
overlap Φ below the threshold (`move_updates.py`), a pair of weights that have nothing in
common (`move_updates.py`), and an update that depends on a weight that the base does not
hold (`adapters/reading.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..adapters.adapter import Adapter
from ..architectures.layouts import load_layout
from ..architectures.modules import (
    TEXT_ENCODERS,
    find_block,
    find_component,
    have_equal_shapes,
    is_in_text_encoder,
    matrix_shape,
    write_shape,
)
from ..bases import Base
from ..bases.describe import describe_base, explain_other_shape
from ..bases.vae import RUN_INSTEAD, can_fit
from ..comparison.module_map import BlockDecision, Match, Matching, Renumbering, find_partners
from ..core.grouping import group_by
from ..errors import ShapeMismatch, UnsupportedFormat

OTHER_MODEL = "; is this LoRA for another model?"
"""What is asked about a LoRA that does not fit its source, where nothing tells its model."""


@dataclass(frozen=True)
class Pair:
    """The adapter's module `source` feeds the target's module `target`; shape is out × in."""

    source: str
    target: str
    shape: tuple[int, ...]


@dataclass
class ModulePlan:
    """The target of every module of an adapter."""

    # Modules to project, in the target's order; a source may feed several targets
    pairs: list[Pair] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)  # text-encoder modules, carried over unchanged
    # Source module -> why the target has no counterpart
    skipped: dict[str, str] = field(default_factory=dict)
    # Source module -> why nothing well defined can be written
    refused: dict[str, str] = field(default_factory=dict)
    rule: str = "same name"  # how modules were paired, for the report
    # Target module -> source module, over all modules of the two bases
    table: Mapping[str, str] = field(default_factory=dict)
    # For blocks matched by similarity, the source of every block and the runner-up
    decisions: tuple[BlockDecision, ...] = ()
    # For blocks matched by similarity, the source's blocks that feed none
    dropped: tuple[str, ...] = ()
    # False where weights are yet to decide which block a module in a block feeds
    is_decided: bool = True
    # Target's block -> the source's block whose weights it holds, where equal names say otherwise.
    renumbered: Mapping[str, str] = field(default_factory=dict)

    def groups(self) -> dict[tuple[int, ...], list[Pair]]:
        """Groups the pairs by weight shape: stacks of equal matrices."""
        return group_by(self.pairs, lambda pair: pair.shape)


def make_plan(
    adapter: Adapter,
    source: Base,
    target: Base,
    match: Match = "auto",
    text_encoder: str = "copy",
) -> ModulePlan:
    """Pairs the adapter's modules with the target's.

    Args:
        adapter: the LoRA of the source base.
        source: the base it was trained on; every module of the adapter must exist there.
        target: the base to move to.
        match: "name" pairs equal names, corrected by the block rules of `bases/layouts` where both
            layouts are known and renumbered blocks make equal names wrong (BK-SDM, SD1.5 ↔ SDXL);
            a JSON file or mapping {target: source} replaces that, and so does a `Matching`.
        text_encoder: "copy" carries text-encoder modules over unchanged where the target has that
            encoder, "project" treats them like all others, "skip" leaves them out.

    Raises:
        UnsupportedFormat: a module the source base does not have; a match that is not understood;
            two architectures without corresponding blocks.
        UnrelatedBases: blocks were matched by similarity, and none was recognised.
        ShapeMismatch: an update that does not fit its source module, or no module at all can go
            over because every shape differs, or because none has a partner and a fit may serve.
    """
    plan = ModulePlan()
    modules = place_text_encoders(adapter, source, target, text_encoder, plan)
    check_fits_source(adapter, modules, source)
    plan.table, plan.rule = find_partners(source, target, match)
    if isinstance(match, Matching):
        if modules:
            match.check_any(source, target)
        plan.decisions, plan.dropped = match.decisions, match.dropped
        plan.is_decided = bool(match.decisions)
    if isinstance(match, Renumbering):
        plan.renumbered = match.blocks
    placed = _pair_modules(set(modules), source, target, plan)
    for name in modules:
        if name not in placed:
            plan.skipped[name] = _explain_skipped(name, match)
    if plan.refused and not plan.pairs:
        name, reason = next(iter(plan.refused.items()))
        raise ShapeMismatch(f"no module of this LoRA fits the target; the first, {name}: {reason}")
    nothing = not (plan.pairs or plan.passed or adapter.vectors)
    if adapter.updates and nothing:
        name, reason = next(iter(plan.skipped.items()))
        way = _offer_fit(source, target) if modules else ""
        raise ShapeMismatch(
            f"no module of this LoRA has a place on the target{way}; the first, {name}: {reason}"
        )
    return plan


def _explain_skipped(name: str, match: Match) -> str:
    if not isinstance(match, Matching):
        return "the target has no such module"
    if find_block(name) and not match.decisions:
        return "the target has fewer blocks of this kind; the weights decide which of them it has"
    if find_block(name):
        return "no block of the target is similar enough to this one"
    return "outside the transformer blocks, where similarity says nothing; `match='name'` pairs it"


def _pair_modules(wanted: set[str], source: Base, target: Base, plan: ModulePlan) -> set[str]:
    """Plans the wanted modules with a partner, or refuses their shape; returns them."""
    pairs = [(module, origin) for module, origin in plan.table.items() if origin in wanted]
    for module, origin in pairs:
        if have_equal_shapes(source.shapes[origin], target.shapes[module]):
            plan.pairs.append(Pair(origin, module, matrix_shape(source.shapes[origin])))
        else:
            there, here = map(write_shape, (target.shapes[module], source.shapes[origin]))
            plan.refused[origin] = (
                f"{module} is {there} on the target but {here} on the source: no published "
                f"data-free method maps between widths{_offer_fit(source, target)}"
            )
    for pair in plan.pairs:
        plan.refused.pop(pair.source, None)  # another of its partners has its shape
    return {origin for _, origin in pairs}


def _offer_fit(source: Base, target: Base) -> str:
    """Offers a fit as the way out; "" where none can run both models."""
    return f" by weights; {RUN_INSTEAD}" if can_fit(source.path, target.path) else ""


def place_text_encoders(
    adapter: Adapter, source: Base, target: Base, mode: str, plan: ModulePlan
) -> list[str]:
    """Puts the modules of text encoders into the plan.

    Returns the modules that are still to be paired: all others, and with mode "project" the text
    encoders' too.
    """
    unplaced = []
    for name in adapter.updates:
        if not is_in_text_encoder(name):
            unplaced.append(name)
        elif mode == "skip":
            plan.skipped[name] = "text encoder, left out as asked"
        elif (reason := _explain_other_encoder(name, source, target)) is not None:
            plan.skipped[name] = reason
        elif mode == "copy":
            plan.passed.append(name)
        elif name in source.shapes and name in target.shapes:
            unplaced.append(name)
        else:
            base = target if name in source.shapes else source
            plan.refused[name] = (
                f"{base.name} holds no weights of this text encoder, so its update cannot be "
                "projected; give the whole pipeline or checkpoint, or copy text encoders"
            )
    return unplaced


def _explain_other_encoder(name: str, source: Base, target: Base) -> str | None:
    """Explains a text-encoder module without counterpart: another encoder's target."""
    if source.layout is None or target.layout is None:
        return None
    number = TEXT_ENCODERS.index(find_component(name))
    sources, targets = (load_layout(base.layout or "").text_encoders for base in (source, target))
    mine = sources[number] if number < len(sources) else None
    there = targets[number] if number < len(targets) else None
    if mine is None or mine == there:
        return None
    return f"the target has {there or 'no text encoder'} where the source has {mine}"


def check_fits_source(adapter: Adapter, modules: list[str], source: Base) -> None:
    """Refuses an update without a fitting module of the source."""
    unknown = [name for name in modules if name not in source.shapes]
    if unknown:
        layout = f" (layout {source.layout})" if source.layout else f" ({describe_base(source)})"
        raise UnsupportedFormat(
            f"{len(unknown)} of {len(modules)} LoRA modules do not exist in the base "
            f"{source.name}{layout}, the first: {unknown[0]}"
        )
    for name in modules:
        shape = tuple(adapter.updates[name].shape)
        if reason := explain_other_shape(name, shape, source, OTHER_MODEL):
            raise ShapeMismatch(reason)
