"""Reports of a fitted LoRA and their rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..adapters.adapter import Adapter
from ..adapters.formats.moves import read_moves
from ..architectures.modules import is_in_text_encoder
from ..bases import Base
from ..core.lowrank import LowRank
from ..core.merging import subtract_updates
from ..moving.ledger import (
    describe_unchanged,
    list_missed,
    list_tensors_left_out,
)
from ..moving.plan import ModulePlan
from ..moving.transfer_report import LITTLE, MOST, TransferReport, describe_coverage, name_amount
from ..reports.lora_report import MovedReport
from ..reports.module_report import ModuleReport, list_unread_modules, split_modules
from ..reports.module_tables import Measured
from ..reports.report import Mark, Sentence
from ..reports.table import Table
from ..verbs.options import FIT, LoraLike
from .fit_plan import FitJob, foresee_work, prepare_fit, target_modules
from .probe_report import ProbeReport
from .settings import FitOptions


@dataclass(frozen=True, repr=False, kw_only=True)
class FitReport(MovedReport):
    """What a fit did, and how well.

    Attributes:
        rank_rule: the rank that was asked for; 0 for the LoRA's own.
        probe: what the fit found; None in a dry run.
        work: what it would ask of the models, in a sentence; of a dry run alone.
    """

    eyebrow: ClassVar[str] = "LoRA fit report"

    rank_rule: int | float = 0
    probe: ProbeReport | None = None
    work: str = ""

    @property
    def share_of_rival(self) -> float | None:
        """What the LoRA moved by weights does on the same samples; None where none was."""
        shares = self.probe.gate.copy_share if self.probe else None
        return None if shares is None else min(shares.values())

    def _judge(self) -> Sentence:
        cautions = tuple(self.cautions())
        if self.probe is None:
            return replace(self._tell_plan(), cautions=cautions)
        gate, why = self.probe.gate, [self.why] if self.why else []
        share = max(0.0, min(gate.share.values()))
        most = share >= MOST
        done = f"{name_amount(share).lower()} ({share:.0%}) of"
        seen = f"does {done} what the LoRA does to {self.source}"
        if self.probe.look:
            seen = f"goes {done} the way to the look of {self.source} with the LoRA"
        lines = [
            f"On samples that the fit did not see it {seen}.",
            f"prolora ran both models and fitted a new LoRA of {self.target}.",
        ]
        if gate.decision == "refuse":
            step = "Next: draw some images with it and without it before you use it."
            headline = "Do not expect much: the fit did not succeed."
            return Sentence("⚠", headline, (*lines, *why, step), cautions)
        step = "Next: try it at strength 1, and less where it is too strong."
        headline = f"This {'should work' if most else 'may work in part'} on {self.target}."
        return Sentence("✔" if most else "⚠", headline, (*lines, *why, step), cautions)

    def _tell_plan(self) -> Sentence:
        names, there = split_modules(self.modules)
        placed = self.totals["energy_mapped"]
        if placed is None:
            placed = len(there) / len(names) if names else 0.0
            place = f"{len(there)} of the LoRA's {len(names)} parts have a place on {self.target}."
        else:
            place = describe_coverage(placed, None, self.target)
        mark: Mark = "✔" if placed >= LITTLE else "⚠"
        lines = tuple(filter(None, (place, self.why)))
        return Sentence(mark, "A dry run: nothing was written.", lines)

    def sentences(self) -> list[str]:
        """Tells what was fitted, and what held-out samples say of it."""
        told = super().sentences() + ([self.work] if self.work else [])
        return told + (self.probe.sentences() if self.probe else [])

    def tables(self) -> list[Table]:
        """Tabulates what did not move."""
        found = super().tables()
        if self.rows("mapped") and not self.dry_run:
            del found[0]  # which compares each part with a copy
        return found

    def _measured(self) -> Sequence[Measured]:
        """Lists the numbers of modules but "kept", since a fit keeps nothing of the copy."""
        return [one for one in super()._measured() if one[0].name != "kept"]


@dataclass(frozen=True, repr=False, kw_only=True)
class BaselineReport(TransferReport):
    """What a move by weights kept, where a fit was no better.

    Attributes:
        probe: what the fit found.
    """

    probe: ProbeReport

    def _describe_method(self) -> str:
        none = (
            "A fit to the running models was no better on samples that it did not see, so this is "
            "the LoRA moved by the weights alone."
        )
        return f"{none} {super()._describe_method()}".rstrip()

    def sentences(self) -> list[str]:
        """Tells what the fit found, and then what the weights gave."""
        told, done = super().sentences(), super(TransferReport, self).sentences()
        so = (
            f"So the LoRA moved by weights alone ('{self.method}') is written, at the strength "
            "that suits it best there."
        )
        return [*done, *self.probe.sentences(), so, *told[len(done) :]]


_VECTOR = "a fit gives updates of matrices only, no biases or normalisation layers"


def plan_fit(lora: LoraLike, source: Base, target: Base, options: FitOptions) -> FitReport:
    """Reports what would be fitted, carried over, skipped and refused, from headers alone."""
    job = prepare_fit(lora, source, target, options, "outline")
    adapter = job.adapter
    modules = target_modules(adapter, source, target)
    rows = list_modules(adapter, job.plan, dict.fromkeys(modules), "would be fitted")
    own = [u.rank for name, u in adapter.updates.items() if not is_in_text_encoder(name)]
    rank = max(own, default=0) if options.rank is None else options.rank
    if rank >= 1:  # a share becomes a rank once the updates are fitted
        for i, row in enumerate(rows):
            if row.target in modules:
                m, *n = modules[row.target]
                rows[i] = replace(row, rank_out=min(int(rank), m, math.prod(n)))
    work = foresee_work(job).sentence(source.name, target.name)
    return build_fit_report(job, rows, work=work, dry_run=True)


def build_fit_report(job: FitJob, rows: Iterable[ModuleReport], **known: Any) -> FitReport:
    """Builds the report of a fit; `known` are further fields of the report."""
    adapter = job.adapter
    return FitReport(
        method=FIT,
        rank_rule=job.options.rank or 0,
        source=job.source.name,
        target=job.target.name,
        modules=tuple(rows),
        left_out=dict.fromkeys(adapter.vectors, _VECTOR) | list_tensors_left_out(adapter),
        unread=list_missed(adapter, job.options.text_encoder),
        moves=read_moves(adapter.metadata),
        **known,
    )


def list_modules(
    adapter: Adapter, plan: ModulePlan, updates: Mapping[str, LowRank | None], how: str
) -> list[ModuleReport]:
    """Lists what became of every LoRA module, and further target modules.

    `updates` is target module -> update, None where it is not yet known; `how` describes a fitted
    module, which is compared with its twin if there is one.
    """
    measured = "norm_ratio", "copy_distance"
    unknown: dict[str, Any] = dict.fromkeys(measured, math.nan)
    rows = []
    for name, update in adapter.updates.items():
        row = describe_unchanged(adapter, name, name, "text encoder, carried over unchanged")
        if name in plan.skipped:
            reason = plan.skipped[name]
            row = replace(row, target=None, status="skipped", reason=reason, rank_out=0)
        elif name not in plan.passed:
            twin = updates.get(name)
            row = replace(row, reason=how, rank_out=twin.rank if twin else 0, **unknown)
            if name not in updates:
                # The target has fewer blocks: its own were fitted to what this module does.
                reason = f"{how}; the target has no module of that name"
                row = replace(row, target=None, reason=reason)
            elif twin is not None and twin.shape == update.shape and (norm := float(update.norm())):
                ratio = float(twin.norm()) / norm
                apart = float(subtract_updates(twin, update).norm()) / norm
                known: dict[str, Any] = dict(zip(measured, (ratio, apart), strict=True))
                row = replace(row, **known)
        rows.append(row)
    rows += [
        ModuleReport(
            source=name,
            target=name,
            status="mapped",
            reason=f"{how}; the LoRA has no module of that name",
            shape=tuple(update.shape) if update else (),
            rank_in=0,
            rank_out=update.rank if update else 0,
            **unknown,
        )
        for name, update in updates.items()
        if name not in adapter.updates
    ]
    return rows + list_unread_modules(adapter)
