"""Rows of reports on LoRAs that are not moved."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.lowrank import LowRank
from ..core.merging import subtract_updates
from ..reports.module_report import LEFT_OUT, ModuleReport


def outline_difference(
    name: str, shape: tuple[int, int], columns: int, reason: str | None = None, energy: float = 0.0
) -> ModuleReport:
    """Makes the row of a module of two bases, or of another tensor.

    The shape is out × in, `columns` the most of its update; `reason` says why it is not extracted.
    """
    if reason:
        return ModuleReport(name, None, "skipped", reason, shape, 0, energy=energy)
    what, rank = "difference of the weights", min(shape) if columns else 0
    return ModuleReport(name, name, "mapped", what, shape, rank, columns, energy)


def describe_difference(
    row: ModuleReport, rank: int, norms: tuple[float, float, float], bound: float | None
) -> ModuleReport:
    """Makes the row of an extracted module.

    The norms are of W_base, of the difference D = W_tuned − W_base, and of D less the update; the
    bound is on the sine of the angle to the best columns, where that is not proven to be small.
    """
    whole, norm, lost = norms
    share = max(0.0, 1 - (lost / norm) ** 2)
    flag = "" if bound is None else f"; not proven to be the best columns (bound {bound:.1e})"
    return replace(
        row,
        reason=row.reason + flag,
        rank_out=rank,
        energy=norm**2,
        norm_ratio=share**0.5,
        copy_distance=(1 - share) ** 0.5,
        rank_cut_energy=1 - share,
        drift=norm / whole if whole else None,
    )


def describe_conversion(
    name: str, kind: str, update: LowRank, written: LowRank, read: float, columns: int = 0
) -> ModuleReport:
    """Makes the row of a converted update, with all loss, rounding included.

    `read` is the share of the file's own update that was read, which has more `columns`; `written`
    is the update as the file holds it.
    """
    lost = subtract_updates(update.to(torch.float64), written.to(torch.float64))
    energy = update.norm().square().item()
    share = lost.norm().square().item() / energy if energy else 0.0
    # What reading cut off is orthogonal to all that it kept.
    loss = min(1.0, 1 - read + read * share) if energy else 0.0
    ratio = (written.norm().square().item() * read / energy) ** 0.5 if energy else 1.0
    return ModuleReport(
        source=name,
        target=name,
        status="mapped",
        reason=kind,
        shape=tuple(update.shape),
        rank_in=max(columns, update.rank),
        rank_out=written.rank,
        energy=energy / read,
        norm_ratio=ratio,
        copy_distance=loss**0.5,
        rank_cut_energy=loss,
    )


def describe_left_out(name: str, update: LowRank) -> ModuleReport:
    """Makes the row of an update whose block has the factor 0."""
    energy = update.norm().square().item()
    shape, rank = tuple(update.shape), update.rank
    return ModuleReport(name, None, "skipped", LEFT_OUT, shape, rank, energy=energy)
