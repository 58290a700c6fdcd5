"""How two base models relate, from their weights alone: before any LoRA is moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from ..architectures.modules import have_equal_shapes, is_adaptable, is_attention, matrix_shape
from ..bases import Base, BaseLike, check_readable, open_base
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache, CacheLike, open_cache
from ..bases.memory import Memory, Room, Work
from ..bases.vae import RUN_INSTEAD, can_fit
from ..core.basis import Basis
from ..core.grouping import group_by
from ..core.precision import in_full_precision
from ..core.rank_rule import Rank, read_rank
from ..core.validation import DeviceLike, resolve_device
from ..core.verdict import (
    DEFAULT_THRESHOLD,
    STRANGE_COSINE,
    Verdict,
    describe_strangers,
    judge_pairs,
)
from ..errors import UnsupportedFormat
from ..files.jsontext import replace_nonfinite
from ..files.sizes import parse_limit
from .block_matching import resolve_match
from .module_comparison import ModuleComparison, average_field, compare_stack
from .module_map import (
    BlockDecision,
    Match,
    Matching,
    Renumbering,
    describe_decisions,
    describe_renumbered,
    find_partners,
)
from .rank_sweep import SweepRow, sweep_columns
from .renumbered_blocks import recognise_blocks

_NAN = math.nan

OVERLAP_RANK: Rank = 0.9
"""The share of energy of the subspaces compared; nearer to 1, chance alone makes Φ large."""


@dataclass(frozen=True)
class Coverage:
    """How much of a source's LoRA would fit weights of the target."""

    # (modules with a counterpart, modules) of a LoRA on all attention weights
    attention: tuple[int, int]
    # The same for a LoRA on all weights that LoRAs are commonly trained on
    adaptable: tuple[int, int]

    @classmethod
    def of(cls, source: Base, placed: Iterable[str]) -> Coverage:
        """Counts the source's modules that are among `placed`."""
        taken = set(placed)
        adaptable = [name for name in source.shapes if is_adaptable(name)]
        attention = [name for name in adaptable if is_attention(name)]
        a, b = (
            (sum(name in taken for name in names), len(names)) for names in (attention, adaptable)
        )
        return cls(a, b)


@dataclass(frozen=True)
class Comparison:
    """Two bases, module by module.

    Attributes:
        source, target: their names.
        match: how modules were paired.
        modules: the pairs of equal shape.
        without_partner: adaptable source modules that no target module takes.
        other_shape: pairs whose widths differ.
        coverage: what a LoRA of the source could expect.
        decisions: where blocks were matched by similarity, every one with its runner-up.
        dropped_blocks: the source's blocks that feed none of the target's.
        renumbered: the target's block -> the source's block whose weights it holds, where equal
            names say otherwise.
    """

    source: str
    target: str
    match: str
    modules: list[ModuleComparison]
    without_partner: int
    other_shape: int
    coverage: Coverage
    decisions: tuple[BlockDecision, ...] = ()
    dropped_blocks: tuple[str, ...] = ()
    renumbered: Mapping[str, str] = field(default_factory=dict)

    def mean(self, field: str) -> float:
        """Averages a field of `ModuleComparison` over the pairs where it is defined."""
        return average_field(self.modules, field)

    @cached_property
    def verdict(self) -> Verdict:
        """Go or no-go, from the affinity of all pairs."""
        return judge_pairs(module.affinity for module in self.modules)

    @cached_property
    def sweep(self) -> list[SweepRow]:
        """The overlap of all pairs against the number of columns; empty where not asked for."""
        return sweep_columns([module.points for module in self.modules if module.points])

    def places(self) -> dict[str, list[ModuleComparison]]:
        """Groups the pairs by part of the model, in the target's order."""
        return group_by(self.modules, lambda module: module.place)

    def sentences(self) -> list[str]:
        """Writes the answer in plain words, with the numbers behind it."""
        sentences = [self.verdict.sentence(), self._lineage()]
        overlaps = {
            name: overlap
            for name, part in self.places().items()
            if not math.isnan(overlap := average_field(part, "above"))
        }
        if overlaps:
            least, most = min(overlaps, key=overlaps.__getitem__), max(overlaps.values())
            passing = sum(min(m.phi_left, m.phi_right) >= DEFAULT_THRESHOLD for m in self.modules)
            sentences.append(
                f"Leading subspaces overlap {self.mean('above'):.2f} above chance (0 unrelated, 1 "
                f"equal): from {overlaps[least]:.2f} in {least} to {most:.2f}; {passing} of "
                f"{len(self.modules)} pairs reach Φ ≥ {DEFAULT_THRESHOLD} on both sides."
            )
        sentences += describe_renumbered(self.renumbered)
        strangers = [(m.source, m.target) for m in self.modules if m.cosine < STRANGE_COSINE]
        if strangers and self.verdict.related:
            sentences.append(describe_strangers(strangers))
        sentences.append(self._coverage())
        return sentences + describe_decisions(self.decisions, self.dropped_blocks)

    def _lineage(self) -> str:
        """Says whether the two come from each other."""
        cosine, drift = round(self.verdict.cosine, 2) + 0.0, self.verdict.drift  # no "-0.00"
        if self.verdict.related:
            return (
                f"Same lineage: the paired weights point the same way (cosine {cosine:.2f}, where "
                f"models trained apart have 0) and differ by {drift:.2g} of their norm."
            )
        return (
            f"No common lineage: the paired weights do not point the same way (cosine "
            f"{cosine:.2f}; related models have nearly 1)."
        )

    def _coverage(self) -> str:
        """Says what a LoRA can expect."""
        (a, all_a), (b, all_b) = self.coverage.attention, self.coverage.adaptable
        lost = f"{self.without_partner} modules have no partner on the target"
        if self.other_shape:
            lost += f", {self.other_shape} pairs have different widths and are refused"
        return (
            f"A LoRA on the source's attention finds a place for {a} of {all_a} modules "
            f"({a / max(1, all_a):.0%}); with feed-forward and projections, for {b} of {all_b} "
            f"({b / max(1, all_b):.0%}). {lost}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON (NaN as None)."""
        numbers = ("phi_left", "phi_right", "above_left", "above_right", "drift")
        fields: dict[str, Any] = asdict(self) | {
            "modules": [module.to_dict() for module in self.modules],
            "decisions": [decision.to_dict() for decision in self.decisions],
            "sweep": [asdict(row) for row in self.sweep],
            "means": {name: self.mean(name) for name in numbers},
            "verdict": asdict(self.verdict) | {"related": self.verdict.related},
            "summary": self.sentences(),
        }
        found: dict[str, Any] = replace_nonfinite(fields)
        return found


@in_full_precision
def compare(
    source: BaseLike,
    target: BaseLike,
    *,
    rank: Rank | None = OVERLAP_RANK,
    match: Match = "auto",
    cache: CacheLike = None,
    device: DeviceLike = None,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measures drift and overlap of every adaptable pair of weights, and judges them.

    Args:
        source: base model as `transfer` takes it.
        target: base model.
        rank: columns, or share of energy, of the subspaces compared. None compares none: the
            verdict needs each weight read once and no singular value decomposition.
        match: how modules are paired, as in `transfer`.
        cache: keeps subspaces, the same folder as `transfer`'s; None keeps nothing.
        device: where to compute. Default: a GPU if present, else the CPU.
        max_memory: bytes of memory that this process may take, or a text such as "2GiB"; None sets
            no bound.
        progress: called as progress(done, total, name).

    Raises:
        UnsupportedDevice: the device cannot be used.
        TooLittleMemory: the bound is below what one pair of weights needs.
        UnsupportedFormat: the two bases share no adaptable module of equal shape, or a weight is
            quantised in a way whose numbers are not read.
        UnrelatedBases: blocks were matched by similarity, and none was recognised.
        NonFiniteWeights: NaN or Inf, named.
    """
    rank = None if rank is None else read_rank(rank)
    device = resolve_device(device)
    limit = parse_limit(max_memory)
    source, target = open_base(source), open_base(target)
    with open_cache(cache) as kept:
        match = resolve_match(
            match,
            source,
            target,
            cache=kept,
            device=device,
            max_memory=limit,
            progress=progress,
        )
        memory = Memory(limit, rank, device)
        needs: Work = "affinity" if rank is None else "bases"
        table, rule = find_partners(source, target, match)
        memory.check(_list_sizes(source, target, table), needs)
        recognised = recognise_blocks(match, source, target)
        if recognised is not match:
            match = recognised
            table, rule = find_partners(source, target, match)
        partners = {t: s for t, s in table.items() if is_adaptable(t)}
        equal = _list_equal_shapes(source, target, match, partners)
        memory.check({matrix_shape(target.shapes[module]) for module in equal}, needs)
        bases = (source, target)
        factorise = None if rank is None else partial(_factorise, kept, rank, device, bases)
        found: dict[str, ModuleComparison] = {}
        for stack in _iterate_stacks(source, target, equal, memory.room()):
            rows = compare_stack(source, target, stack, factorise)
            found.update((row.target, row) for row in rows)
            if progress:
                progress(len(found), len(equal), stack[-1][1])
    taken = set(partners.values())
    blocks = match if isinstance(match, Matching) else None
    return Comparison(
        source.name,
        target.name,
        rule,
        [found[module] for module in equal],
        without_partner=sum(is_adaptable(n) and n not in taken for n in source.shapes),
        other_shape=len(partners) - len(equal),
        coverage=Coverage.of(source, equal.values()),
        decisions=blocks.decisions if blocks else (),
        dropped_blocks=blocks.dropped if blocks else (),
        renumbered=dict(match.blocks) if isinstance(match, Renumbering) else {},
    )


def _list_sizes(source: Base, target: Base, table: Mapping[str, str]) -> set[tuple[int, int]]:
    """Lists the matrix shapes of the pairs whose weights have one shape."""
    return {
        matrix_shape(target.shapes[t])
        for t, s in table.items()
        if is_adaptable(t) and have_equal_shapes(source.shapes[s], target.shapes[t])
    }


def _list_equal_shapes(
    source: Base, target: Base, match: Match, partners: Mapping[str, str]
) -> dict[str, str]:
    """Returns {target module: source module} of pairs with equal weight shapes.

    Raises:
        UnrelatedBases: blocks were matched by similarity, and none was recognised.
        UnsupportedFormat: no such pair, or a weight of one is quantised in a way whose
            numbers are not read.
    """
    equal = {
        t: s for t, s in partners.items() if have_equal_shapes(source.shapes[s], target.shapes[t])
    }
    if isinstance(match, Matching):
        match.check_any(source, target)
    if not equal:
        raise UnsupportedFormat(_explain_nothing_shared(source, target, partners))
    check_readable(source, equal.values())
    check_readable(target, equal)
    return equal


def _iterate_stacks(
    source: Base, target: Base, equal: Mapping[str, str], room: Room
) -> Iterator[list[tuple[str, str]]]:
    """Yields (source module, target module) pairs in stacks that memory holds.

    A stack has one shape and dtype; `equal` is target module -> source module of equal shape.
    """
    groups: dict[tuple[object, ...], list[tuple[str, str]]] = {}
    for module, origin in equal.items():
        shape = matrix_shape(target.shapes[module])
        kind = (shape, source.dtypes[origin], target.dtypes[module])
        groups.setdefault(kind, []).append((origin, module))
    for pairs in groups.values():
        size = room.stack(matrix_shape(target.shapes[pairs[0][1]]), "comparison")
        for i in range(0, len(pairs), size):
            yield pairs[i : i + size]


def _factorise(
    cache: BasisCache,
    rank: Rank,
    device: DeviceLike,
    bases: tuple[Base, Base],
    pairs: Sequence[tuple[str, str]],
    weights: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> tuple[Basis, Basis]:
    """Returns the bases of the weights of pairs of modules, as two stacks."""
    requests = [partial(cache.look_up_weights, some, rank) for some in weights]
    first, second = cache.in_turn(requests, rank, device)
    return first, second


def _explain_nothing_shared(source: Base, target: Base, partners: Mapping[str, str]) -> str:
    """Explains why there is nothing to compare, and what may work instead."""
    way = ""
    if can_fit(source.path, target.path):
        way = f"; {RUN_INSTEAD}"
    if partners:
        return (
            f"every pair of {source.name} and {target.name} has different widths: no published "
            f"data-free method maps between widths{way}"
        )
    return (
        f"{source.name} and {target.name} have no attention or feed-forward module of equal "
        f"name and shape: weights alone cannot relate them{way}"
    )
