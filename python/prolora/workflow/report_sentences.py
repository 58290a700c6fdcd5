"""Sentences of a report with the numbers of what was kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..core.methods import find_method
from .block_weights import LEFT_OUT
from .module_report import ModuleReport


def share_left_out(modules: Sequence[ModuleReport]) -> float:
    """Returns the share of Σ‖ΔW_s‖² in blocks left out as asked."""
    everything = {row.source: row.energy for row in modules}
    left = {row.source: row.energy for row in modules if row.reason == LEFT_OUT}
    total = sum(everything.values())
    return sum(left.values()) / total if total > 0 else 0.0


def tell_factors(blocks: str, modules: Sequence[ModuleReport]) -> list[str]:
    """Tells the factors by block, and how many modules have 0."""
    gone = sum(row.reason == LEFT_OUT for row in modules)
    what = f"; {gone} modules have the factor 0 and are left out as asked" if gone else ""
    return [f"Factors by block, as asked: {blocks}{what}."] if blocks else []


def tell_left_behind(
    modules: Sequence[ModuleReport], unread: Sequence[str], left_out: Mapping[str, str]
) -> list[str]:
    """Tells what of the file stays behind.

    `unread` are modules whose updates could not be read; `left_out` is tensor that is no update ->
    why it is not moved.
    """
    sentences = []
    if unread:
        reason = next(row.reason for row in modules if row.source == unread[0])
        sentences.append(
            f"Careful: {_count(unread, 'update')} of the file could not be read and "
            f"{'stays' if len(unread) == 1 else 'stay'} behind; {unread[0]}: {reason}."
        )
    if left_out:
        name, reason = next(iter(left_out.items()))
        sentences.append(f"{tell_tensors_left(left_out)}; {name}: {reason}.")
    return sentences


def tell_tensors_left(left_out: Mapping[str, str]) -> str:
    """Tells how many tensors stay behind, without a full stop."""
    stay = "stays" if len(left_out) == 1 else "stay"
    return f"{_count(left_out, 'tensor')} of the file {stay} behind"


def _count(things: Collection[str], what: str) -> str:
    """Writes a number of things: 1 update, 2 updates."""
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def tell_energy(totals: Mapping[str, Any], method: str, strength: float) -> list[str]:
    """Tells what the moved modules keep of the LoRA; `totals` are the report's."""
    sentences = [
        f"The moved modules hold {totals['energy_mapped']:.0%} of the LoRA's energy; "
        f"'{method}' at strength {strength:.2g} keeps "
        f"{totals['energy_surviving']:.0%} of that, and its result is "
        f"{totals['copy_distance']:.0%} of the update's norm away from plain copying."
    ]
    mixed = totals["energy_mixed"]
    if mixed is not None and mixed > 0.01 and find_method(method).needs_bases:
        sentences.append(
            f"{mixed:.0%} lay in the mixed blocks, which '{method}' "
            "drops; `method='copy'` changes nothing."
        )
    return sentences


def tell_limits(
    modules: Sequence[ModuleReport], totals: Mapping[str, Any], file_limit: int | None
) -> list[str]:
    """Tells what a bound on the file cost, and which bases are inexact.

    `file_limit` is the bytes of the file that the updates were cut for; None where they were not.
    """
    sentences = []
    if file_limit is not None:
        ranks = [row.rank_out for row in modules if row.status == "mapped"]
        sentences.append(
            f"Cut to fit {file_limit / 1e6:.4g} MB: ranks {min(ranks)} to {max(ranks)}, "
            f"at the price of {totals['energy_cut']:.1%} of the energy."
        )
    if totals["flagged"]:
        sentences.append(f"{totals['flagged']} modules missed the accuracy tolerance (see 'ok').")
    return sentences


def tell_relative(count: int, source: str, target: str) -> str:
    """Warns of updates that a copy keeps although they depend on the base."""
    return (
        f"{count} updates are relative to the weights of {source} (DoRA, OFT or GLoRA). They are "
        f"kept as they are stored, and act on those of {target} now."
    )
