"""The overlap of two weights' bases, computed once for each pair.

It is the same for every LoRA, and so it is kept beside the bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..bases.cache.tables import JsonTable
from ..core.projectors import AnyBasis
from ..core.subspaces import ANGLE_SHARES, Similarity, angle_quantiles, basis_similarity

# The start of a pair's note; another word where it holds other numbers.
KEY_PREFIX = "alignment"
OVERLAPS, ANGLES = 4, len(ANGLE_SHARES)


@dataclass(frozen=True)
class Alignment:
    """The alignment of the bases of a stack of pairs."""

    similar: Similarity  # Φ with its chance level, [b] each
    # Principal angles of each pair in radians, at the shares ANGLE_SHARES of their number, smallest
    # first
    angles_left: list[tuple[float, ...]]
    angles_right: list[tuple[float, ...]]

    def take(self, places: Sequence[int]) -> Alignment:
        """Selects some pairs of the stack."""
        chosen = list(places)
        return Alignment(
            Similarity(*(x[chosen] for x in _similarity_columns(self.similar))),
            [self.angles_left[i] for i in chosen],
            [self.angles_right[i] for i in chosen],
        )


def align_bases(
    names: Sequence[tuple[str | None, ...]], source: AnyBasis, target: AnyBasis, notes: JsonTable
) -> Alignment:
    """Returns the alignment of a stack of pairs; computes only what notes lack.

    `names` are of each pair the names of its two bases (`BasisCache.names`), or None; the bases are
    stacks [b, m, n]. What is computed goes into `notes`, the table of `BasisCache.pairs`.
    """
    keys = [None if None in pair else " ".join((KEY_PREFIX, *map(str, pair))) for pair in names]
    recalled = [_check_row(notes.get(key)) if key else None for key in keys]
    missing = [i for i, row in enumerate(recalled) if row is None]
    if missing:
        computed = _compute_rows(source.take(missing), target.take(missing))
        for i, row in zip(missing, computed, strict=True):
            if key := keys[i]:
                notes.put(key, row)
            recalled[i] = row
    rows = [row for row in recalled if row is not None]
    columns = torch.tensor(rows, dtype=torch.float64, device=source.rank.device)[:, :OVERLAPS]
    return Alignment(
        Similarity(*columns.unbind(1)),
        [tuple(row[OVERLAPS : OVERLAPS + ANGLES]) for row in rows],
        [tuple(row[OVERLAPS + ANGLES :]) for row in rows],
    )


def _compute_rows(source: AnyBasis, target: AnyBasis) -> list[list[float]]:
    """Computes each pair's numbers: the overlaps, then the angles left and right."""
    similar = torch.stack(
        [x.double() for x in _similarity_columns(basis_similarity(source, target))], 1
    )
    return torch.cat([similar, *angle_quantiles(source, target)], 1).tolist()


def _similarity_columns(similar: Similarity) -> tuple[torch.Tensor, ...]:
    return similar.left, similar.right, similar.chance_left, similar.chance_right


def _check_row(note: Any) -> list[float] | None:
    """Returns the numbers of a note, or None if it is malformed."""
    if not isinstance(note, list) or len(note) != OVERLAPS + 2 * ANGLES:
        return None
    return note if all(isinstance(number, float) for number in note) else None
