"""The leading subspaces of a whole base model, summarised by shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from ..linalg.basis import truncated_svd
from ..linalg.choice import Rank
from . import open_base
from .cache import BasisCache
from .modules import is_adaptable, matrix_shape


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


def survey(
    base: Any,
    rank: Rank,
    *,
    cache: str | PathLike[str] | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[ShapeSurvey]:
    """Computes every adaptable weight's basis and keeps what it says of itself.

    Args:
        base: as `open_base` takes it.
        rank: columns, or share of energy.
        cache: folder that keeps the subspaces for later transfers, and gives those it has.
        device: where to compute; None means the CPU.
        progress: called as progress(done, total, name).
    """
    base = open_base(base)
    subspaces = BasisCache(cache).bases if cache else truncated_svd
    groups: dict[tuple[int, int], list[str]] = {}
    for name, shape in base.shapes.items():
        if is_adaptable(name):
            groups.setdefault(matrix_shape(shape), []).append(name)
    total, done, rows = sum(len(names) for names in groups.values()), 0, []
    for shape, names in groups.items():
        started = time.perf_counter()
        found = []
        for name in names:
            found.append(subspaces(base.read(name).reshape(1, *shape).to(device), rank)[0])
            done += 1
            if progress:
                progress(done, total, name)
        columns = [int(basis.rank) for basis in found]
        rows.append(
            ShapeSurvey(
                shape=shape, count=len(names), columns_min=min(columns), columns_max=max(columns),
                energy=sum(basis.energy.item() for basis in found) / len(found),
                bound=max(basis.bound.item() for basis in found),
                flagged=sum(not basis.ok.item() for basis in found),
                rungs="+".join(sorted({basis.rung for basis in found})),
                seconds=time.perf_counter() - started,
            )
        )  # fmt: skip
    return rows
