"""The forms of `out_rank`: how many columns an update keeps when it is written."""

from __future__ import annotations

import math
import re

from ..core.lowrank import LowRank
from ..files.sizes import parse_size

OutRank = int | float | str

EXACT = "exact"
OUT_RANK_FORMS = (
    '"exact", an int ≥ 1, a share of the energy between 0 and 1, a percentage such as "50%", or '
    'the size of a file such as "100MB"'
)

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


def parse_percentage(out_rank: OutRank) -> float | None:
    """Returns the number before the % of "50%"; None for any other form."""
    match = _PERCENT.fullmatch(out_rank) if isinstance(out_rank, str) else None
    return float(match[1]) if match else None


def parse_size_limit(out_rank: OutRank) -> int | None:
    """Returns the bytes of "100MB"; None for any other form.

    A number without a unit is a rank.
    """
    if not isinstance(out_rank, str) or not out_rank.strip()[-1:].isalpha():
        return None
    try:
        return parse_size(out_rank)
    except ValueError:
        return None


def is_out_rank(out_rank: object) -> bool:
    """Returns whether a value is one of `OUT_RANK_FORMS`."""
    if isinstance(out_rank, str):
        number = parse_percentage(out_rank) or parse_size_limit(out_rank) or 0
        return out_rank == EXACT or number > 0
    if isinstance(out_rank, float):
        return 0 < out_rank < 1
    return isinstance(out_rank, int) and not isinstance(out_rank, bool) and out_rank >= 1


def cut_rank(update: LowRank, out_rank: OutRank, rank_in: int) -> LowRank:
    """Cuts the update [m, n] to its output rank; unchanged if nothing is cut.

    `out_rank` "exact" keeps it; an int keeps at most that many singular values; a float the fewest
    that hold this share of Σσ²; "50%" half as many as the LoRA's own rank `rank_in`, rounded up; a
    size keeps it too, as it bounds all updates together (see `OutputForm.fit`).
    """
    if out_rank == EXACT or parse_size_limit(out_rank) is not None:
        return update
    if isinstance(out_rank, float):
        return update.truncate(energy=out_rank)
    share = parse_percentage(out_rank)
    if share is None:
        most = int(out_rank)
    else:
        most = max(1, math.ceil((rank_in or update.rank) * share / 100))
    return update.truncate(rank=most) if most < update.rank else update
