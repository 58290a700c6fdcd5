"""Method "best": by weights, and by a fit to the running models where weights say too little.

A fit replaces what the weights give only where modules of the LoRA have no place on the target,
where weights move nothing (bases trained apart or built differently, latents that differ), or where
the target draws in few steps. Elsewhere fits were at times worse than the copy (docs/evidence.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapters.lora import Lora
from ..bases import Base, vae
from ..errors import LowCoverage, ProLoRAError, ShapeMismatch, UnrelatedBases, UnsupportedFormat
from .by_fitting.fit_report import FitReport
from .by_fitting.pipeline import fit_to_pipelines, prepare_fit
from .by_fitting.plan import explain_need, foresee_work
from .by_fitting.rows import outline_report
from .by_weights.base_pair import Notes, move_lora
from .fit_options import FitOptions
from .lora_report import LoraReport, MovedReport
from .options import BEST, OF_A_FIT_TOO, LoraLike, TransferOptions
from .result import Transfer
from .resume import Recipe

UNMOVED = (UnrelatedBases, ShapeMismatch, UnsupportedFormat, LowCoverage)
"""Refusals of a move by weights that a fit may get around; what it cannot, it refuses as well."""


@dataclass(frozen=True)
class BestWay:
    """Two bases, and both ways to move a LoRA between them."""

    source: Base  # the base of the LoRA
    target: Base  # the base it goes to
    by_weights: TransferOptions  # the options of a move by weights
    by_fit: FitOptions  # the options of a fit
    runs: bool  # a fit can run both
    latents: str | None  # why their latents differ; None where they do not

    @classmethod
    def of(cls, source: Base, target: Base, options: TransferOptions) -> BestWay:
        """Looks at the folders; `options` belong to method "best"."""
        runs, latents = vae.can_fit(source.path, target.path), None
        if runs:
            assert source.path is not None and target.path is not None
            latents = vae.explain_different_latents(source.path, target.path)
        fit = FitOptions(**{name: getattr(options, name) for name in OF_A_FIT_TOO})
        if latents is not None:  # images cross, of which a fit takes more (docs/evidence.md)
            fit = replace(fit, images=2 * fit.images)
        return cls(source, target, replace(options, method="auto"), fit, runs, latents)

    def move(self, lora: LoraLike, *, for_file: bool = False) -> Transfer:
        """Moves a LoRA by weights or by a fit; the report says why.

        `for_file` puts into the header of what and how the result was made.

        Raises:
            ProLoRAError: neither way moves it; see `prolora.transfer` and `prolora.fit`.
        """
        notes: dict[type, Notes] = {}
        if for_file and isinstance(lora, Lora):
            for options in (self.by_weights, self.by_fit):
                made = Recipe.of(lora, self.source, self.target, options)
                notes[type(options)] = made.describe
        moved = self._try_weights(lora, notes.get(TransferOptions))
        need = self.explain_need(moved.report if isinstance(moved, Transfer) else moved)
        if need:
            try:
                ends = lora, self.source, self.target
                done = fit_to_pipelines(*ends, self.by_fit, notes.get(FitOptions))
                return replace(done, report=tell_fitted(done.report, need))
            except ProLoRAError as error:
                if isinstance(moved, Transfer):
                    return replace(moved, report=tell_refused(moved.report, need, error))
                raise
        if isinstance(moved, ProLoRAError):
            raise moved
        return replace(moved, report=self.tell_weights(moved.report))

    def plan(self, lora: LoraLike) -> LoraReport:
        """Plans what `move` would do; it reads the weights, which decide.

        Raises:
            ProLoRAError: see `move`.
        """
        moved = self._try_weights(lora)
        found = moved.report if isinstance(moved, Transfer) else moved
        need = self.explain_need(found)
        if need:
            job = prepare_fit(lora, self.source, self.target, self.by_fit, "outline")
            outline = outline_report(job.adapter, job.plan, job.source, job.target, self.by_fit)
            return tell_fitted(outline, need)
        if isinstance(found, ProLoRAError):
            raise found
        return replace(self.tell_weights(found), dry_run=True)

    def _try_weights(self, lora: LoraLike, notes: Notes | None = None) -> Transfer | ProLoRAError:
        """Moves a LoRA by weights alone, or returns why this fails."""
        if self.latents is not None:
            return UnrelatedBases(self.latents)
        try:
            return move_lora(lora, self.source, self.target, self.by_weights, notes)
        except UNMOVED as error:
            return error

    def explain_need(self, found: LoraReport | ProLoRAError) -> str:
        """Returns why a fit is called for; "" where weights serve, or no model can run."""
        if not self.runs:
            return ""
        if isinstance(found, UnrelatedBases) and self.latents is not None:
            return self.latents
        return explain_need(found, self.source, self.target, self.by_fit.target_steps)

    def tell_weights(self, report: LoraReport) -> LoraReport:
        """Adds to a report of a move by weights why no fit was made."""
        if not self.runs:
            why = "No fit was tried: it runs both models, given as folders of whole pipelines."
        else:
            images = foresee_work(self.source, self.target, self.by_fit).as_images
            why = (
                f"No fit was made: all of the LoRA has a place on {self.target.name}, which draws "
                "in many steps as far as its files tell (`target_steps` says otherwise); fits were "
                "at times worse there on test models. One would take about as long as drawing "
                f"{images:,} images with {self.source.name}."
            )
        return _tell_why(report, why)


def tell_refused(report: LoraReport, need: str, error: ProLoRAError) -> LoraReport:
    """Adds to a report of a move by weights why a fit failed."""
    return _tell_why(report, f"A fit was tried because {need}, but: {error}.")


def tell_fitted(report: LoraReport, need: str) -> LoraReport:
    """Adds to a report of a fit why it is made and its gain."""
    why = f"Both models {'would be' if report.dry_run else 'were'} run because {need}."
    gate = report.probe.gate if isinstance(report, FitReport) and report.probe else None
    if gate is not None and gate.copy_share is not None:
        rival = min(gate.copy_share.values())
        does = f"does {rival:.0%}" if rival > 0 else f"does harm ({rival:.0%})"
        why += f" The LoRA moved by the weights alone {does} on the same samples."
    return _tell_why(report, why)


def _tell_why(report: LoraReport, why: str) -> LoraReport:
    assert isinstance(report, MovedReport)
    return replace(report, asked=BEST, why=why)
