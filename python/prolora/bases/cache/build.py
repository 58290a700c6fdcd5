"""The leading subspaces of all weights of a base model, summarised by shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ...architectures.modules import is_adaptable, matrix_shape
from ...core.basis import Basis
from ...core.grouping import group_by
from ...core.precision import in_full_precision
from ...core.rank_rule import Rank, read_rank
from ...core.validation import DeviceLike, resolve_device
from ...files.sizes import parse_limit
from .. import BaseLike, open_base
from ..base import Progress
from ..memory import Memory
from .basis_cache import CacheLike, open_cache

_Facts = tuple[int, float, float, bool, str]
"""Of a basis: columns, energy, bound, whether it is within the tolerance, algorithm."""


@dataclass(frozen=True)
class ShapeSurvey:
    """All adaptable weights of one shape.

    Attributes:
        shape: out × in.
        count: matrices.
        columns_min, columns_max: k that the rank rule chose.
        energy: mean share of ‖W‖² in these columns.
        bound: the largest upper bound on the sine of the largest principal angle.
        flagged: matrices whose bound exceeds the tolerance.
        rungs: algorithms used.
        seconds: wall time.
    """

    shape: tuple[int, int]
    count: int
    columns_min: int
    columns_max: int
    energy: float
    bound: float
    flagged: int
    rungs: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@in_full_precision
def survey_base(
    base: BaseLike,
    rank: Rank,
    *,
    cache: CacheLike = None,
    device: DeviceLike = None,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
) -> list[ShapeSurvey]:
    """Computes every adaptable weight's basis and keeps what it says of itself.

    Args:
        base: as `open_base` takes it.
        rank: columns, or share of energy.
        cache: keeps the subspaces for later transfers, and gives those it has.
        device: where to compute. Default: a GPU where there is one, and else the CPU.
        max_memory: bytes of memory that this process may take, or a text such as "2GiB"; None sets
            no bound.
        progress: called as progress(done, total, name).

    Raises:
        ValueError: a rank that is neither.
        UnsupportedDevice: the device cannot be used.
        TooLittleMemory: the bound is below what the largest weight needs.
    """
    rank = read_rank(rank)
    device = resolve_device(device)
    base = open_base(base)
    memory = Memory(parse_limit(max_memory), rank, device)
    shapes = base.shapes
    groups = group_by(filter(is_adaptable, shapes), lambda name: matrix_shape(shapes[name]))
    memory.check(groups, "bases")
    room = memory.room()
    total, done, rows = sum(len(names) for names in groups.values()), 0, []
    with open_cache(cache) as kept:
        for shape, names in groups.items():
            started = time.perf_counter()
            facts, size = [], room.stack(shape, "bases")
            stacks = [names[i : i + size] for i in range(0, len(names), size)]
            requests = (partial(kept.look_up, base, stack, rank) for stack in stacks)
            for stack, bases in zip(stacks, kept.in_turn(requests, rank, device), strict=True):
                facts += _list_facts(bases)
                done += len(stack)
                if progress:
                    progress(done, total, stack[-1])
            rows.append(_summarise_shape(shape, facts, time.perf_counter() - started))
    return rows


def _list_facts(bases: Basis) -> list[_Facts]:
    columns = (bases.rank, bases.energy, bases.bound, bases.ok)
    return list(zip(*(x.tolist() for x in columns), bases.rungs, strict=True))


def _summarise_shape(
    shape: tuple[int, int], facts: Sequence[_Facts], seconds: float
) -> ShapeSurvey:
    columns, energies, bounds, sound, rungs = zip(*facts, strict=True)
    return ShapeSurvey(
        shape=shape,
        count=len(facts),
        columns_min=min(columns),
        columns_max=max(columns),
        energy=sum(energies) / len(energies),
        bound=max(bounds),
        flagged=sound.count(False),
        rungs="+".join(sorted(set(rungs))),
        seconds=seconds,
    )
