"""The forms of `out_rank`: how many columns an update keeps when it is written."""

from __future__ import annotations

import math
import re

from ..core.lowrank import LowRank

OutRank = int | float | str

EXACT = "exact"
OUT_RANK_FORMS = (
    '"exact", an int ≥ 1, a share of the energy between 0 and 1, or a percentage such as "50%"'
)

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


def parse_percentage(out_rank: OutRank) -> float | None:
    """Returns the number before the % of "50%"; None for any other form."""
    match = _PERCENT.fullmatch(out_rank) if isinstance(out_rank, str) else None
    return float(match[1]) if match else None


def is_out_rank(out_rank: object) -> bool:
    """Returns whether a value is one of `OUT_RANK_FORMS`."""
    if isinstance(out_rank, str):
        return out_rank == EXACT or (parse_percentage(out_rank) or 0) > 0
    if isinstance(out_rank, float):
        return 0 < out_rank < 1
    return isinstance(out_rank, int) and not isinstance(out_rank, bool) and out_rank >= 1


def cut_rank(update: LowRank, out_rank: OutRank, rank_in: int) -> LowRank:
    """Cuts the update [m, n] to its output rank; unchanged if nothing is cut.

    `out_rank` "exact" keeps it; an int keeps at most that many singular values; a float the fewest
    that hold this share of Σσ²; "50%" half as many as the LoRA's own rank `rank_in`, rounded up.
    """
    if out_rank == EXACT:
        return update
    if isinstance(out_rank, float):
        return update.truncate(energy=out_rank)
    share = parse_percentage(out_rank)
    if share is None:
        most = int(out_rank)
    else:
        most = max(1, math.ceil((rank_in or update.rank) * share / 100))
    return update.truncate(rank=most) if most < update.rank else update
