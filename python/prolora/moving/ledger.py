"""One LoRA between two bases: what was read, where each module goes, and what became of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.adapter import Adapter
from ..architectures.modules import find_block, is_in_text_encoder
from ..bases import Base
from ..core.affinity import Affinity
from ..core.lowrank import LowRank
from ..core.precision import is_finite
from ..core.verdict import STRANGE_COSINE, PairVerdict
from ..errors import NonFiniteWeights
from ..reports.module_report import LEFT_OUT, ModuleReport, list_unread_modules
from ..verbs.options import LoraLike, TextEncoderMode, TransferOptions, cut_rank
from .plan import ModulePlan, Pair


class Clock:
    """Adds up wall seconds by stage."""

    def __init__(self) -> None:
        """Starts with no stage."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the body and adds it to the stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


@dataclass
class Ledger:
    """One LoRA between two bases, from its plan to its result."""

    # The LoRA; its updates are those with a counterpart on the target, cut to the target's rows and
    # columns.
    adapter: Adapter
    plan: ModulePlan  # where its modules go
    source: Base  # the base it comes from, cut like the updates
    target: Base  # the base it goes to
    options: TransferOptions  # how it is moved; once that is decided, with its method
    # What was read, to be read anew where the names turn out to pair blocks wrongly
    lora: LoraLike | None = None
    # Pair, or module without one -> its row of the report. Every module has one from the plan on.
    rows: dict[Pair | str, ModuleReport] = field(default_factory=dict)
    # Target module -> affinity of its pair of weights
    affinities: dict[str, Affinity] = field(default_factory=dict)
    # The method that was asked for, once another one may have been decided
    asked: str | None = None
    verdict: PairVerdict | None = None  # on the pair of bases; None where no weight is moved
    moved: dict[str, LowRank] = field(default_factory=dict)  # target module -> update
    # Target module -> factor of its block, where that is not 1
    block_factors: dict[str, float] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)  # the time that was spent
    warnings: tuple[str, ...] = ()  # what is doubtful of the bases that were given

    def settle(self) -> None:
        """Writes block factors into the rows, and the LoRA's size beside the weights it meets."""
        factors, weights, updates = self.block_factors, 0.0, 0.0
        if factors:
            self.rows = {key: _scale_row(row, factors) for key, row in self.rows.items()}
        for pair in self.plan.pairs:
            affinity = self.affinities.get(pair.target)
            if affinity is None or affinity.cosine < STRANGE_COSINE:  # left out by the verdict, too
                continue
            updates += self.rows[pair].energy
            weights += affinity.source
        if self.verdict is not None:
            size = math.sqrt(updates / weights) if weights else None
            self.verdict = replace(self.verdict, size=size)

    @property
    def result_bytes(self) -> int:
        """Bytes that the moved updates take in memory, at most."""
        factor = 2 if self.options.chosen.needs_bases else 1
        updates = (self.adapter.updates[pair.source] for pair in self.plan.pairs)
        return sum(4 * factor * (x.up.numel() + x.down.numel()) for x in updates)

    def enter(self, pair: Pair, update: LowRank | None, reason: str, **measured: Any) -> None:
        """Keeps a moved update at its strength and output rank, on the CPU; writes its row.

        The update is as the method gave it, None where the pair is skipped; the reason says how it
        was moved, or why not; what was measured are further fields of the row.

        Raises:
            NonFiniteWeights: the update overflows.
        """
        if "energy" not in measured:
            measured["energy"] = self.adapter.updates[pair.source].norm().square().item()
        row = replace(self.rows[pair], reason=reason, **measured)
        if update is None:
            row = replace(row, target=None, status="skipped", rank_out=0)
        else:
            row = row.at_strength(self.options.strength)
            if self.options.strength != 1:
                update = LowRank(update.up * self.options.strength, update.down)
            update = update.to("cpu")
            smaller = cut_rank(update, self.options.out_rank, row.rank_in)
            if smaller is not update:
                original = self.adapter.updates[pair.source]
                row, update = row.cut(original, update, smaller), smaller
            if not (is_finite(update.up) and is_finite(update.down)):
                raise NonFiniteWeights(f"the moved update of {row.source} is not finite")
            row = replace(row, rank_out=update.rank)
            self.moved[pair.target] = update
        self.write(pair, row)

    def write(self, pair: Pair, row: ModuleReport) -> None:
        """Writes the row of a pair, with what is known of its weights."""
        if (affinity := self.affinities.get(pair.target)) is not None:
            row = replace(row, drift=affinity.drift, cosine=affinity.cosine)
        self.rows[pair] = row


def _scale_row(row: ModuleReport, factors: Mapping[str, float]) -> ModuleReport:
    """Applies the factor of its block (target module -> factor) to a module's row."""
    factor = factors.get(row.target or "", 1.0)
    if row.status != "mapped" or factor == 1:
        return row
    if factor == 0:
        return replace(row, target=None, status="skipped", rank_out=0, reason=LEFT_OUT)
    return replace(row.at_strength(factor), reason=f"{row.reason}; times {factor:g} for its block")


def outline_rows(ledger: Ledger, *, measured: bool) -> None:
    """Writes a row for every module of the LoRA: nothing has been moved yet.

    With `measured`, modules that will be moved have their energy, as all others have.
    """
    adapter, plan = ledger.adapter, ledger.plan
    for status, reasons in (("skipped", plan.skipped), ("refused", plan.refused)):
        for name, reason in reasons.items():
            row = describe_unchanged(adapter, name, None, reason)
            ledger.rows[name] = replace(row, status=status, rank_out=0)
    ledger.rows |= {row.source: row for row in list_unread_modules(adapter)}
    energy = None if measured else 0.0
    for pair in plan.pairs:
        what, most = "has its place", ledger.options.out_rank
        place: str | None = pair.target
        if not plan.is_decided and find_block(pair.target):
            what, place = "has a place: the weights decide in which block", None
        row = describe_unchanged(adapter, pair.source, place, what, energy)
        rank = min(row.rank_in, most) if isinstance(most, int) else row.rank_in
        ledger.write(pair, replace(row, rank_out=rank))
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


def list_missed(adapter: Adapter, text_encoder: TextEncoderMode) -> tuple[str, ...]:
    """Lists modules with unreadable updates, except those left out as asked."""
    asked = text_encoder == "skip"
    return tuple(name for name in adapter.unread if not (asked and is_in_text_encoder(name)))


def list_tensors_left_out(adapter: Adapter) -> dict[str, str]:
    """Returns tensor of the file that is no update and is not moved -> why."""
    return {n: reason for n, reason in adapter.left_out.items() if n not in adapter.unread}
