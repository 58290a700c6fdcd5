"""Transformer blocks of two bases, matched by their weights alone.

Blocks of the same kind and shapes are compared by how much the leading singular subspaces of their
attention matrices overlap, beyond what chance gives. Training drifts and pruning renumbers, but
neither changes the order of the blocks: the assignment is one-to-one and monotone, among the blocks
of one stack and among the stacks. Inserted blocks stay without a partner; the caller chooses what
feeds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..architectures.depth import UNET_STAGES
from ..architectures.modules import find_block, is_attention
from ..bases import Base
from ..bases.base import Progress, check_finite
from ..bases.cache.basis_cache import BasisCache, CacheLike, open_cache
from ..bases.memory import Budget, Memory
from ..bases.vae import RUN_INSTEAD
from ..core.basis import Basis, stack_bases
from ..core.grouping import group_by
from ..core.precision import in_full_precision, working_dtype
from ..core.validation import DeviceLike, resolve_device
from ..errors import NonFiniteWeights, UnsupportedFormat
from ..files.sizes import parse_limit
from .assignment import monotone_assignment
from .module_map import AUTO_MATCH, ONLY_FIT, BlockDecision, Match, Matching, are_names_clear
from .transformer_blocks import Block, BlockGroup, group_blocks, list_blocks

# Columns compared: 1/8 of the short side, and no more than that is in SDXL. Drift reaches leading
# directions last, and the fewer columns, the lower the chance level and the cost.
COLUMNS_SHARE, MOST_COLUMNS = 8, 160
# Short sides of the matrices compared, added up, from which on more would tell nothing new: all
# eight attention matrices of a block up to 640 wide, four at 1280, two at 3072.
ENOUGH_DIMENSIONS = 5120
# From here on an overlap counts as a relation: a score that blocks of one model do not reach among
# each other, though they read and write the same features (at most 0.06 in the mini family), and so
# many standard deviations beyond chance, which matters where matrices are small.
MIN_SCORE = 0.1
MIN_DEVIATIONS = 6.0
# A block whose score with a block of the source is below this share of another's is told from it.
CLEARLY_LESS = 0.8


@in_full_precision
def match_blocks(
    source: Base,
    target: Base,
    *,
    cache: CacheLike = None,
    device: DeviceLike = None,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
) -> Matching:
    """Finds the source's block for every transformer block of the target.

    The modules around a stack of blocks (`proj_in`, `proj_out`) follow its blocks. Modules outside
    all blocks are paired by equal name and shape, since each exists once. Convolutions are left
    alone: nothing here says where they went.

    `cache`, `device`, `max_memory` and `progress` are a transfer's options.

    Raises:
        UnsupportedDevice: the device cannot be used.
        UnsupportedFormat: the two have no transformer blocks of the same kind and shape, or two
            blocks of the target resemble one of the source nearly alike.
        TooLittleMemory: the bound is below what the largest weight needs.
        NonFiniteWeights: NaN or Inf, named.
    """
    device = resolve_device(device)
    groups = _find_groups(source, target)
    room = _find_room(groups, parse_limit(max_memory), device)
    with open_cache(cache) as opened:
        subspaces = _Subspaces(opened, device, room, _report_steps(groups, progress))
        return _match_groups(source, target, groups, subspaces)


def _find_groups(source: Base, target: Base) -> list[BlockGroup]:
    """Groups the blocks of a kind, or refuses bases without any in common."""
    if groups := group_blocks(source, target):
        return groups
    raise UnsupportedFormat(
        f"{source.name} and {target.name} have no blocks of the same kind and shape: these models "
        f"have different widths. {ONLY_FIT}"
    )


def _match_groups(
    source: Base,
    target: Base,
    groups: list[BlockGroup],
    subspaces: _Subspaces,
) -> Matching:
    decisions: list[BlockDecision] = []
    partners: dict[str, str] = {}
    dropped: list[str] = []
    stack_partners: dict[str, str] = {}
    for sources, targets in groups:
        scores, deviations = _score_blocks(source, sources, target, targets, subspaces)
        related = torch.where(
            (scores >= MIN_SCORE) & (deviations >= MIN_DEVIATIONS), scores, torch.zeros_like(scores)
        )
        pairs, stacks = _assign_blocks(related, sources, targets)
        _refuse_rivals(pairs, related, (source, sources), (target, targets))
        stack_partners |= stacks
        taken = set(pairs.values())
        dropped += [block.name for i, block in enumerate(sources) if i not in taken]
        for j, block in enumerate(targets):
            decision = _record_decision(
                block, pairs.get(j), scores[:, j], deviations[:, j], sources
            )
            best = int(scores[:, j].argmax())
            if j not in pairs and float(related[best, j]) > 0:
                decision = replace(decision, resembles=sources[best].name)
            decisions.append(decision)
            if decision.source is not None:
                partners[decision.target] = decision.source
    table = dict(_pair_modules(source, target, partners, stack_partners))
    order = {block.name: i for i, block in enumerate(list_blocks(target))}
    decisions.sort(key=lambda decision: order[decision.target])
    return Matching(table, tuple(decisions), tuple(dropped))


def resolve_match(match: Match, source: Base, target: Base, **how: Any) -> Match:
    """Recognises the blocks for a match that only weights can decide.

    That is "similarity", and "auto" where names do not tell; every other match stays as it is.
    Whatever makes a plan calls this first, since a plan reads no weights. `how` and errors as for
    `match_blocks`.
    """
    return match_blocks(source, target, **how) if _takes_weights(match, source, target) else match


def preview_match(match: Match, source: Base, target: Base) -> Match:
    """Resolves a match from headers: where weights decide, blocks of a kind are paired in order.

    That shows how many blocks have a place, and not which. Errors as for `match_blocks`.
    """
    if not _takes_weights(match, source, target):
        return match
    partners: dict[str, str] = {}
    stacks: dict[str, str] = {}
    for sources, targets in _find_groups(source, target):
        for old, new in zip(sources, targets, strict=False):
            partners[new.name] = old.name
            stacks.setdefault(new.stack, old.stack)
    return Matching(dict(_pair_modules(source, target, partners, stacks)), (), ())


def _takes_weights(match: Match, source: Base, target: Base) -> bool:
    """Returns whether weights alone tell which blocks belong together."""
    unknown = match == AUTO_MATCH and not are_names_clear(source, target)
    return isinstance(match, str) and (match == "similarity" or unknown)


def _choose_evidence(source: Block, target: Block) -> list[str]:
    """Returns the modules to compare: attention, or whatever both have.

    Not all of them where matrices are large: the more dimensions, the less two subspaces overlap by
    chance, and the more a singular value decomposition costs.
    """
    names = [name for name in sorted(target.shapes) if name in source.shapes]
    chosen: list[str] = []
    dimensions = 0
    for name in [name for name in names if is_attention(name)] or names:
        if dimensions >= ENOUGH_DIMENSIONS:
            break
        chosen.append(name)
        dimensions += min(target.shapes[name])
    return chosen


def _choose_rank(shape: tuple[int, int]) -> int:
    """Returns how many columns of a weight's subspaces are compared."""
    return max(1, min(min(shape) // COLUMNS_SHARE, MOST_COLUMNS))


def _find_room(groups: list[BlockGroup], limit: int | None, device: DeviceLike) -> Budget:
    """Returns how much can be factorised beside one module's bases of all blocks.

    Raises:
        TooLittleMemory: not even one weight.
    """
    shapes: set[tuple[int, int]] = set()
    size = 0
    for sources, targets in groups:
        for module in _choose_evidence(sources[0], targets[0]):
            shape = sources[0].shapes[module]
            shapes.add(shape)
            size = max(size, (len(sources) + len(targets)) * 4 * sum(shape) * _choose_rank(shape))
    memory = Memory(limit, max(map(_choose_rank, shapes)), device)
    memory.check(shapes, "bases", size)
    return memory.room(size)


def _report_steps(
    groups: list[BlockGroup], progress: Progress | None
) -> Callable[[list[str]], None]:
    """Adds up the weights that are factorised, for the caller's callback."""
    total = sum(
        len(_choose_evidence(sources[0], targets[0])) * (len(sources) + len(targets))
        for sources, targets in groups
    )
    done = 0

    def report(modules: list[str]) -> None:
        nonlocal done
        done += len(modules)
        if progress:
            progress(done, total, modules[-1])

    return report


@dataclass(frozen=True)
class _Subspaces:
    """Leading subspaces of weights, one module over many blocks at once."""

    cache: BasisCache
    device: DeviceLike  # None means the CPU
    room: Budget  # how many are computed at a time
    report: Callable[[list[str]], None]  # called with the names of the weights that were factorised

    def of(self, base: Base, blocks: list[Block], module: str) -> Basis:
        """Returns the bases of one module of every block, stacked [blocks, m, n]."""
        shape = blocks[0].shapes[module]
        names = [f"{block.name}.{module}" for block in blocks]
        size = self.room.stack(shape, "bases")
        bases: list[Basis] = []
        for some in (names[i : i + size] for i in range(0, len(names), size)):
            try:
                stack = self.cache.of(base, some, _choose_rank(shape), self.device)
            except NonFiniteWeights:
                check_finite(base, some)  # says which one
                raise
            bases += [stack[i] for i in range(len(some))]
            self.report(some)
        return stack_bases(bases)


def _score_blocks(
    source: Base, sources: list[Block], target: Base, targets: list[Block], subspaces: _Subspaces
) -> tuple[Tensor, Tensor]:
    """Returns (scores, deviations) [source blocks, target blocks], see `BlockDecision`."""
    modules = _choose_evidence(sources[0], targets[0])
    above = torch.zeros(len(sources), len(targets), dtype=torch.float64)
    excess, variance = torch.zeros_like(above), torch.zeros_like(above)
    for module in modules:
        a, b = subspaces.of(source, sources, module), subspaces.of(target, targets, module)
        for left, right in ((a.U, b.U), (a.V, b.V)):
            phi, chance, spread = _measure_overlaps(left, a.rank, right, b.rank)
            above += (phi - chance) / (1 - chance).clamp_min(1e-12) / (2 * len(modules))
            excess += phi - chance
            variance += spread
    return above, excess / variance.sqrt().clamp_min(1e-12)


def _measure_overlaps(
    left: Tensor, left_rank: Tensor, right: Tensor, right_rank: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (Φ, its mean and its variance between unrelated subspaces), all [a, b].

    On the CPU. For random subspaces of p and q out of d dimensions, ‖XᵀY‖² has mean pq/d and
    variance 2pq(d−p)(d−q)/(d²(d−1)(d+2)). `left` is [a, d, k] and `right` [b, d, k'], orthonormal
    columns; `left_rank` [a] and `right_rank` [b] are the columns in use.
    """
    d = left.shape[1]
    work = working_dtype(left.dtype, right.dtype)
    left, right = left.to(work), right.to(work)
    columns = [
        torch.linalg.vector_norm(left.mT @ one, dim=(1, 2), dtype=torch.float64).square()
        for one in right
    ]
    p = left_rank.double().cpu().clamp_min(1)[:, None]
    q = right_rank.double().cpu().clamp_min(1)[None, :]
    fewest = torch.minimum(p, q)
    spread = 2 * p * q * (d - p) * (d - q) / (d**2 * max(1, d - 1) * (d + 2))
    phi = torch.stack(columns, dim=1).cpu() / fewest
    return phi, p * q / d / fewest, spread / fewest.square()


def _assign_blocks(
    scores: Tensor, sources: list[Block], targets: list[Block]
) -> tuple[dict[int, int], dict[str, str]]:
    """Returns {target block: source block} and {target stack: source stack}, both monotone."""
    sources_in, targets_in = _group_by_stack(sources), _group_by_stack(targets)
    inner = {
        (a, b): monotone_assignment(scores[sources_in[a]][:, targets_in[b]])
        for a in sources_in
        for b in targets_in
    }
    totals = torch.zeros(len(sources_in), len(targets_in), dtype=torch.float64)
    for x, a in enumerate(sources_in):
        for y, b in enumerate(targets_in):
            block = scores[sources_in[a]][:, targets_in[b]]
            totals[x, y] = sum(float(block[i, j]) for i, j in inner[a, b])
    pairs: dict[int, int] = {}
    stacks: dict[str, str] = {}
    for x, y in monotone_assignment(totals):
        a, b = list(sources_in)[x], list(targets_in)[y]
        stacks[b] = a
        pairs |= {targets_in[b][j]: sources_in[a][i] for i, j in inner[a, b]}
    return pairs, stacks


def _refuse_rivals(
    pairs: Mapping[int, int],
    related: Tensor,
    source: tuple[Base, list[Block]],
    target: tuple[Base, list[Block]],
) -> None:
    """Refuses target blocks that resemble the same source block nearly alike.

    `pairs` is {target block: source block} by index; `related` has the scores [source blocks,
    target blocks], 0 where two blocks are not related.
    """
    (one, sources), (other, targets) = source, target
    free = [j for j in range(len(targets)) if j not in pairs]
    for index, origin in pairs.items():
        for j in free:
            # Between the two lie only blocks of the same stack without a partner.
            between = range(min(index, j) + 1, max(index, j))
            beside = targets[j].stack == targets[index].stack and not pairs.keys() & set(between)
            if beside and related[origin, j] > CLEARLY_LESS * related[origin, index]:
                raise UnsupportedFormat(
                    f"{targets[index].name} and {targets[j].name} of {other.name} resemble "
                    f"{sources[origin].name} of {one.name} nearly alike, as inserted copies do, "
                    "and their leading directions do not tell which of them it was: give a map "
                    f"with `match=FILE`; or {RUN_INSTEAD}"
                )


def _group_by_stack(blocks: list[Block]) -> dict[str, list[int]]:
    """Returns stack -> indices of its blocks, in order."""
    return group_by(range(len(blocks)), lambda i: blocks[i].stack)


def _record_decision(
    block: Block, chosen: int | None, scores: Tensor, deviations: Tensor, sources: list[Block]
) -> BlockDecision:
    """Records what was chosen for a block, and the best of the others."""
    ranked = sorted(range(len(sources)), key=lambda i: -float(scores[i]))
    best = ranked[0] if chosen is None else chosen
    others = [i for i in ranked if i != best]
    return BlockDecision(
        target=block.name,
        source=None if chosen is None else sources[chosen].name,
        score=float(scores[best]),
        deviations=float(deviations[best]),
        runner_up=sources[others[0]].name if others else None,
        runner_up_score=float(scores[others[0]]) if others else math.nan,
    )


def _pair_modules(
    source: Base, target: Base, partners: Mapping[str, str], stack_partners: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yields (target module, source module): inside matched blocks, around them, outside all."""
    stacks = {b.rpartition(".")[0]: a.rpartition(".")[0] for b, a in stack_partners.items()}
    for module in target.shapes:
        block = find_block(module)
        stack = ".".join(module.split(".")[:-1])
        if block:
            origin = partners.get(f"{block.stack}.{block.number}")
            partner = origin and f"{origin}.{block.local}"
        elif stack and stack in stacks:
            partner = f"{stacks[stack]}.{module.rpartition('.')[2]}"
        elif module.split(".")[0] in UNET_STAGES:
            partner = None
        else:
            same = source.shapes.get(module) == target.shapes[module]
            partner = module if same else None
        if partner and partner in source.shapes:
            yield module, partner
