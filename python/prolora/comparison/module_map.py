"""The source module for each target module, over two whole bases.

By name and block rules, by a map, or by the result of `block_matching`; no weight is read here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from ..architectures.families import known_families
from ..architectures.layouts import find_correspondence
from ..architectures.modules import find_block, is_adaptable, is_in_text_encoder
from ..bases import Base
from ..bases.describe import classify_model, describe_base, list_adaptable_shapes
from ..errors import UnrelatedBases, UnsupportedFormat
from ..files.jsontext import read_json_object

# Bytes of a map file, and letters of a name in one: 100,000 modules have 16 MB.
_MAP_BYTES, _LONGEST_NAME = 16 << 20, 1024
_FORMS = 'match takes "auto", "name", "similarity" or a JSON file'


@dataclass(frozen=True)
class BlockDecision:
    """The origin of one target block, and the alternatives."""

    target: str  # the target's block
    # The block that feeds it; None if none overlaps beyond chance, or all that do feed others
    source: str | None
    # Mean above-chance overlap of the two over modules and sides: 0 as unrelated, 1 as equal; the
    # best candidate's where source is None.
    score: float
    deviations: float  # how many standard deviations the overlap lies beyond chance
    runner_up: str | None  # the source's block with the next best score; None without another
    runner_up_score: float  # its score, NaN without one
    # Where source is None, the source's block that it overlaps most beyond chance, which feeds
    # another one: it is a copy or a mixture of it.
    resembles: str | None = None

    @property
    def margin(self) -> float:
        """Score over runner-up; below 0 where the order of the blocks overruled the overlap."""
        return self.score - self.runner_up_score

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields and the margin."""
        return asdict(self) | {"margin": self.margin}


@dataclass(frozen=True)
class Matching:
    """Partners from `block_matching.match_blocks`; accepted wherever a `Match` is."""

    table: Mapping[str, str]  # target module -> source module
    # One for every block of the target, in its order; empty where weights are yet to decide
    decisions: tuple[BlockDecision, ...]
    dropped: tuple[str, ...]  # the source's blocks that feed none

    @property
    def rule(self) -> str:
        """For the report."""
        if not self.decisions:
            return "similarity: the weights decide which block feeds which, in the transfer"
        margins = [d.margin for d in self.decisions if d.source and not math.isnan(d.margin)]
        matched = sum(decision.source is not None for decision in self.decisions)
        notes = f", least margin {min(margins):.3f}" if margins else ""
        return f"similarity: {matched} of {len(self.decisions)} blocks matched{notes}"

    def check_any(self, source: Base, target: Base) -> None:
        """Raises UnrelatedBases if no block was recognised."""
        if not self.decisions or any(decision.source for decision in self.decisions):
            return
        best = max(decision.score for decision in self.decisions)
        raise UnrelatedBases(
            f"No-go: no transformer block of {target.name} overlaps with one of {source.name} "
            f"beyond chance (the best by {best:.2f}, where 1 is equal). These bases were trained "
            'apart, or the target drifted too far to tell; match "name" pairs equal names'
        )


@dataclass(frozen=True)
class Renumbering:
    """Partners by name, corrected by `renumbered_blocks.recognise_blocks`."""

    table: Mapping[str, str]  # target module -> source module
    by_name: str  # the rule that was corrected
    # Target's block -> the source's block that it was made from, where names differ
    blocks: Mapping[str, str]

    @property
    def rule(self) -> str:
        """For the report."""
        return f"{self.by_name}, but for {len(self.blocks)} renumbered blocks"


def describe_renumbered(blocks: Mapping[str, str]) -> list[str]:
    """Describes renumbered blocks as sentences, if any were found."""
    if not blocks:
        return []
    target, source = next(iter(blocks.items()))
    return [
        f"{len(blocks)} blocks of the target hold the weights of another block than their names "
        f"say, the first, {target}, those of {source}: they get the updates of that block."
    ]


Match = str | PathLike[str] | Mapping[str, str] | Matching | Renumbering
"""How modules are paired.

`"auto"`: by equal names or the map of a known family, corrected where the weights of renumbered
blocks say otherwise, and by similarity where names do not tell; `"name"`: by names alone;
`"similarity"`: blocks are recognised by their weights; a JSON file {target module: source module};
such a mapping, or a `Matching`. Where only weights tell, `block_matching.resolve_match` makes a
`Matching` of it."""

AUTO_MATCH = "auto"
ONLY_FIT = "Only `fit()` moves a LoRA between them; it needs both as diffusers folders"


class AmbiguousNames(UnsupportedFormat):
    """Equal names need not be equal blocks: only weights, or a map, tell which belong together."""

    code = "ambiguous-names"


def are_names_clear(source: Base, target: Base) -> bool:
    """Returns whether names say which blocks belong together.

    Two bases without any partners count too.
    """
    try:
        _partners_by_name(source, target)
    except AmbiguousNames:
        return False
    except UnsupportedFormat:
        return True
    return True


def find_partners(
    source: Base, target: Base, match: Match = AUTO_MATCH
) -> tuple[dict[str, str], str]:
    """Returns {target module: source module} for all partners, and the rule's name.

    Raises:
        UnsupportedFormat: a match that is not understood, or two architectures without
            corresponding blocks.
    """
    if isinstance(match, Matching | Renumbering):
        return dict(match.table), match.rule
    if isinstance(match, str) and match in (AUTO_MATCH, "name"):
        return _partners_by_name(source, target)
    if isinstance(match, str) and match == "similarity":
        raise UnsupportedFormat(
            "matching by similarity reads weights: call block_matching.resolve_match first"
        )
    if isinstance(match, Mapping):
        table, rule_name = dict(match), "the caller's map"
    elif not isinstance(match, str | PathLike):
        raise UnsupportedFormat(f"{_FORMS} {{target module: source module}}, not {match!r}")
    else:
        table, rule_name = read_map(Path(match)), f"the map {Path(match).name}"
    for side, names, base in (("target", table, target), ("source", table.values(), source)):
        missing = [name for name in names if name not in base.shapes]
        if missing:
            raise UnsupportedFormat(
                f"{rule_name} names {side} modules that {base.name} lacks, the first: {missing[0]}"
            )
    return table, rule_name


def _partners_by_name(source: Base, target: Base) -> tuple[dict[str, str], str]:
    """Pairs equal names, or the blocks of two known layouts in either direction."""
    source_layout, target_layout = source.layout, target.layout
    if source_layout is None or target_layout is None or source_layout == target_layout:
        same = {name: name for name in target.shapes if name in source.shapes}
        if not same:
            if source.family is target.family is None:
                _refuse_other_names(source, target)
            _refuse_unrelated(source, target)
        if source_layout is None or target_layout is None:
            _refuse_other_depth(source, target)
        return same, "same name"
    rule = find_correspondence(source_layout, target_layout)
    if rule is not None:
        pairs = (
            (name, start) for name in target.shapes if (start := rule.source_of(name)) is not None
        )
    else:
        rule = find_correspondence(target_layout, source_layout)
        if rule is None:
            if source.family is None or source.family != target.family:
                _refuse_unrelated(source, target)
            _refuse_other_depth(source, target)
            same = {name: name for name in target.shapes if name in source.shapes}
            return same, f"same name, as {source_layout} and {target_layout} have the same blocks"
        pairs = ((end, name) for name in source.shapes if (end := rule.source_of(name)) is not None)
    partners = {t: s for t, s in pairs if t in target.shapes and s in source.shapes}
    partners |= {
        name: name for name in target.shapes if is_in_text_encoder(name) and name in source.shapes
    }
    return partners, f"{source_layout} to {target_layout}: {rule.evidence.rstrip('.')}"


def _refuse_other_names(source: Base, target: Base) -> NoReturn:
    """Refuses two unknown models that have no name in common, and shows a name of each."""
    missing = next(iter(source.shapes))
    there = difflib.get_close_matches(missing, target.shapes, n=1, cutoff=0)
    raise UnsupportedFormat(
        f"{target.name} has no {missing}; it has {', '.join(there) or 'no weights'}. "
        "The two models have no module name in common: rename the weights of one, or give `match` "
        "a JSON file {target module: source module}"
    )


def _refuse_other_depth(source: Base, target: Base) -> None:
    """Refuses to pair blocks by number if a stack has more in one base.

    Blocks are inserted and dropped anywhere, so that numbers say nothing then. A UNet's stacks are
    short and lie in stages, where names say more.
    """
    if "UNet" in (classify_model(source), classify_model(target)):
        return
    sources, targets = _list_block_numbers(source), _list_block_numbers(target)
    for stack in sources.keys() & targets.keys():
        if sources[stack] != targets[stack]:
            raise AmbiguousNames(
                f"{stack} has {len(sources[stack])} blocks in {source.name} and "
                f"{len(targets[stack])} in {target.name}, so names cannot tell which block "
                'is which; match "similarity" recognises them by their weights'
            )


def _list_block_numbers(base: Base) -> dict[str, set[str]]:
    """Returns stack -> the numbers of its blocks that hold something to train."""
    numbers: dict[str, set[str]] = {}
    for module in base.shapes:
        block = find_block(module)
        if block is not None and is_adaptable(module):
            numbers.setdefault(block.stack, set()).add(block.number)
    return numbers


def _refuse_unrelated(source: Base, target: Base) -> NoReturn:
    """Refuses two bases without known partners: by kind, by width, or at all."""
    shared = list_adaptable_shapes(source) & list_adaptable_shapes(target)
    if classify_model(source) != classify_model(target) or not shared:
        kinds = " and ".join(
            known_families()[base.family].title if base.family else describe_base(base)
            for base in (source, target)
        )
        raise UnsupportedFormat(
            f"{source.name} and {target.name} are different kinds of model ({kinds}), and no block "
            f"of one corresponds to a block of the other. {ONLY_FIT}"
        )
    what = f"{source.name} is {describe_base(source)}, {target.name} is {describe_base(target)}"
    raise AmbiguousNames(
        f"{what}: nothing is known about which of their blocks belong together, and equal names "
        'need not be equal modules; match "similarity" recognises blocks by their weights'
    )


def read_map(path: Path) -> dict[str, str]:
    """Reads a map of modules: a JSON object {target module: source module}.

    Raises:
        UnsupportedFormat: it is missing or damaged, holds anything else, or more than a model has.
    """
    try:
        table = read_json_object(path, _MAP_BYTES)
    except UnsupportedFormat as error:
        raise UnsupportedFormat(
            f"{_FORMS} {{target module: source module}}; {path} is neither ({error})"
        ) from error
    for target, source in table.items():
        if not isinstance(source, str) or max(len(source), len(target)) > _LONGEST_NAME:
            raise UnsupportedFormat(
                f"{path}: {target[:80]!r} leads to {str(source)[:80]!r}; a map of modules has a "
                "JSON object of target and source names"
            )
    return table
