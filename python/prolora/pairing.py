"""Which source module feeds which target module: a transfer's plan, made from names and shapes.

No weight is read here. Every module of the adapter ends in the plan exactly once, as a pair, as
skipped with the reason, or as refused with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from .adapters.adapter import Adapter
from .bases import Base, correspondence
from .bases.modules import matrix_shape
from .errors import ShapeMismatch, UnsupportedFormat

Match = str | PathLike[str] | Mapping[str, str]
"""`"name"`, a JSON file {target module: source module}, or such a mapping."""

TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")


@dataclass(frozen=True)
class Pair:
    """One update's way: the adapter's module `source` feeds the target module `target`."""

    source: str
    target: str
    shape: tuple[int, ...]


@dataclass
class Plan:
    """Where every module of an adapter goes.

    Attributes:
        pairs: modules to project, in the target's order. A source may feed several targets.
        passed: text-encoder modules, carried over unchanged.
        skipped: source module -> why it has no place on the target.
        refused: source module -> why nothing well defined can be written.
        rule: how the pairs were found, for the report.
    """

    pairs: list[Pair] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rule: str = "same name"

    def groups(self) -> dict[tuple[int, ...], list[Pair]]:
        """The pairs by weight shape: each group is one stack of equal matrices."""
        groups: dict[tuple[int, ...], list[Pair]] = {}
        for pair in self.pairs:
            groups.setdefault(pair.shape, []).append(pair)
        return groups


def make_plan(
    adapter: Adapter, source: Base, target: Base, match: Match = "name", text_encoder: str = "copy"
) -> Plan:
    """Pairs the adapter's modules with the target's.

    Args:
        adapter: the LoRA of the source base.
        source: the base it was trained on; every module of the adapter must exist there.
        target: the base it shall move to.
        match: "name" pairs equal names, corrected by the block rules of `bases/layouts` where both
            layouts are known and renumbered blocks make equal names wrong (BK-SDM, SD1.5 ↔ SDXL);
            a JSON file or mapping {target: source} replaces that.
        text_encoder: "copy" carries text-encoder modules over unchanged, "skip" leaves them out.

    Raises:
        UnsupportedFormat: a module the source base does not have; a match that is not understood.
        ShapeMismatch: an update that does not fit its source module, or no module at all can go
            over because every shape differs.
    """
    plan = Plan()
    unet = [name for name in adapter.updates if not name.startswith(TEXT_ENCODERS)]
    for name in adapter.updates:
        if name.startswith(TEXT_ENCODERS):
            if text_encoder == "copy":
                plan.passed.append(name)
            else:
                plan.skipped[name] = "text encoder, left out as asked"
    _check_source(adapter, unet, source)
    found, plan.rule = feeds(source, target, match)
    wanted = set(unet)
    placed: set[str] = set()
    for module, origin in found.items():
        if origin not in wanted:
            continue
        placed.add(origin)
        ours, theirs = source.shapes[origin], target.shapes[module]
        if matrix_shape(ours) != matrix_shape(theirs):
            plan.refused[origin] = (
                f"{module} is {_text(theirs)} on the target but {_text(ours)} on the source: no "
                "published data-free method maps between widths"
            )
            continue
        plan.pairs.append(Pair(origin, module, matrix_shape(ours)))
    for pair in plan.pairs:
        plan.refused.pop(pair.source, None)  # it found a place on another target module
    for name in unet:
        if name not in placed:
            plan.skipped[name] = "the target has no such module"
    if plan.refused and not plan.pairs:
        name, reason = next(iter(plan.refused.items()))
        raise ShapeMismatch(f"no module of this LoRA fits the target; the first, {name}: {reason}")
    return plan


def _check_source(adapter: Adapter, modules: list[str], source: Base) -> None:
    """Every update must belong to a module of the source, and fit it."""
    unknown = [name for name in modules if name not in source.shapes]
    if unknown:
        layout = f" (layout {source.layout})" if source.layout else ""
        raise UnsupportedFormat(
            f"{len(unknown)} of {len(modules)} LoRA modules do not exist in the source base "
            f"{source.name}{layout}, the first: {unknown[0]}. Is this LoRA for another "
            "architecture, or --source the wrong base? `prolora inspect` says what it is for"
        )
    for name in modules:
        update = adapter.updates[name]
        expected = matrix_shape(source.shapes[name])
        if tuple(update.shape) != expected:
            raise ShapeMismatch(
                f"the LoRA's update of {name} is {_text(tuple(update.shape))}, but that module of "
                f"{source.name} is {_text(expected)} ({source.tensor_name(name)})"
            )


def feeds(source: Base, target: Base, match: Match = "name") -> tuple[dict[str, str], str]:
    """{target module: source module} over all modules that have a partner, and the rule's name."""
    if isinstance(match, str) and match == "name":
        return _feeds_by_name(source, target)
    if isinstance(match, Mapping):
        table, rule_name = dict(match), "the caller's map"
    else:
        table, rule_name = _read_map(Path(match)), f"the map {Path(match).name}"
    for side, names, base in (("target", table, target), ("source", table.values(), source)):
        missing = [name for name in names if name not in base.shapes]
        if missing:
            raise UnsupportedFormat(
                f"{rule_name} names {side} modules that {base.name} lacks, the first: {missing[0]}"
            )
    return table, rule_name


def _feeds_by_name(source: Base, target: Base) -> tuple[dict[str, str], str]:
    """Equal names, or the block rule of two known layouts, read in either direction."""
    ours, theirs = source.layout, target.layout
    if ours is None or theirs is None or ours == theirs:
        return {name: name for name in target.shapes if name in source.shapes}, "same name"
    rule = correspondence(ours, theirs)
    if rule is not None:
        found = (
            (name, start) for name in target.shapes if (start := rule.source_of(name)) is not None
        )
    else:
        rule = correspondence(theirs, ours)
        if rule is None:
            raise UnsupportedFormat(
                f"nothing is known about which blocks of {ours} and {theirs} belong together, and "
                "equal names need not be equal modules: give --match a JSON file "
                "{target module: source module}"
            )
        found = ((end, name) for name in source.shapes if (end := rule.source_of(name)) is not None)
    partners = {t: s for t, s in found if t in target.shapes and s in source.shapes}
    return partners, f"{ours} to {theirs}: {rule.evidence}"


def _read_map(path: Path) -> dict[str, str]:
    """A user's map file."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedFormat(
            f'--match takes "name" or a JSON file {{target module: source module}}; {path} is '
            f"neither ({error})"
        ) from error
    strings = isinstance(table, dict) and all(isinstance(v, str) for v in table.values())
    if not strings:
        raise UnsupportedFormat(f"{path} must hold one JSON object of target: source names")
    return dict(table)


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(str(length) for length in shape)
