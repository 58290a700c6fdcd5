"""The rows of a report, from the plan on."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..adapters.adapter import Adapter
from ..architectures.modules import is_in_text_encoder
from ..core.lowrank import LowRank
from ..core.merging import subtract_updates
from ..reports.module_report import LEFT_OUT, ModuleReport
from .ledger import Ledger
from .options import TextEncoderMode


def outline_rows(ledger: Ledger, *, measured: bool) -> None:
    """Writes a row for every module of the LoRA: nothing has been moved yet.

    With `measured`, the rows of modules that will be moved have their energy already; all others
    have it in any case.
    """
    adapter, plan = ledger.adapter, ledger.plan
    for status, reasons in (("skipped", plan.skipped), ("refused", plan.refused)):
        for name, reason in reasons.items():
            row = describe_unchanged(adapter, name, None, reason)
            ledger.rows[name] = replace(row, status=status, rank_out=0)
    ledger.rows |= {row.source: row for row in list_unread_modules(adapter)}
    energy = None if measured else 0.0
    for pair in plan.pairs:
        what = "would be projected"
        ledger.write(pair, describe_unchanged(adapter, pair.source, pair.target, what, energy))
    for name in plan.passed:
        what = "text encoder, carried over"
        ledger.rows[name] = describe_unchanged(adapter, name, name, what)


def describe_unchanged(
    adapter: Adapter, name: str, target: str | None, reason: str, energy: float | None = None
) -> ModuleReport:
    """Makes the row of a module that goes over as it is.

    Its energy ‖ΔW_s‖² may be known already.
    """
    update = adapter.updates[name]
    if energy is None:
        energy = update.norm().square().item()
    return ModuleReport(
        source=name,
        target=target,
        status="mapped",
        reason=reason,
        shape=tuple(update.shape),
        rank_in=update.rank,
        rank_out=update.rank,
        energy=energy,
    )


def list_unread_modules(adapter: Adapter) -> list[ModuleReport]:
    """Lists the rows of modules with unread updates: refused, or left out."""
    return [
        ModuleReport(
            source=name,
            target=None,
            status="refused" if name in adapter.refused else "skipped",
            reason=adapter.left_out[name],
            shape=(out, inputs),
            rank_in=rank,
        )
        for name, (out, inputs, rank) in adapter.unread.items()
    ]


def describe_place(name: str, shape: tuple[int, int], reason: str | None) -> ModuleReport:
    """Makes the row of a LoRA's module on a base.

    `reason` says why it has no counterpart, None if it has.
    """
    status, target = ("skipped", None) if reason else ("mapped", name)
    return ModuleReport(name, target, status, reason or "has its place", shape, 1)


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
    kept = max(0.0, 1 - (lost / norm) ** 2)
    flag = "" if bound is None else f"; not proven to be the best columns (bound {bound:.1e})"
    return replace(
        row,
        reason=row.reason + flag,
        rank_out=rank,
        energy=norm**2,
        norm_ratio=kept**0.5,
        rank_cut_energy=1 - kept,
        drift=norm / whole if whole else None,
    )


def describe_conversion(
    name: str, kind: str, update: LowRank, written: LowRank, read: float
) -> ModuleReport:
    """Makes the row of a converted update, with all loss, rounding included.

    `read` is the share of the file's own update that was read; `written` the update as the file
    holds it.
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
        rank_in=update.rank,
        rank_out=written.rank,
        energy=energy / read,
        norm_ratio=ratio,
        rank_cut_energy=loss,
    )


def describe_left_out(name: str, update: LowRank) -> ModuleReport:
    """Makes the row of an update whose block has the factor 0."""
    energy = update.norm().square().item()
    shape, rank = tuple(update.shape), update.rank
    return ModuleReport(name, None, "skipped", LEFT_OUT, shape, rank, energy=energy)


def list_missed(adapter: Adapter, text_encoder: TextEncoderMode) -> tuple[str, ...]:
    """Lists modules with unreadable updates, except those left out as asked."""
    asked = text_encoder == "skip"
    return tuple(name for name in adapter.unread if not (asked and is_in_text_encoder(name)))


def list_tensors_left_out(adapter: Adapter) -> dict[str, str]:
    """Returns tensor of the file that is no update and is not moved -> why."""
    return {n: reason for n, reason in adapter.left_out.items() if n not in adapter.unread}
