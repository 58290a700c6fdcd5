"""Method "best": a LoRA moved by weights, or fitted where these say too little.

A fit replaces what the weights give only where modules of the LoRA have no place on the target,
where weights move nothing (bases trained apart or built differently, latents that differ), or where
the target draws in few steps. Elsewhere fits were at times worse than the copy (docs/evidence.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, cast

from ..bases import Base, vae
from ..bases.base import Progress
from ..errors import (
    InvalidOption,
    ProLoRAError,
    ShapeMismatch,
    UnrelatedBases,
    UnsupportedFormat,
)
from ..moving.base_pair import BasePair
from ..reports.lora_report import LoraReport, MovedReport
from ..verbs.options import BEST, OF_A_FIT_TOO, LoraLike, TransferOptions
from ..verbs.result import Transfer, write_or_keep
from .fit import fit_lora
from .fit_plan import explain_need
from .fit_report import plan_fit
from .kept_parts import KeptParts, watch_pipelines
from .settings import SHOWN, FitOptions

__all__ = ["KeptParts", "WeightsElseFit"]

UNMOVED = (UnrelatedBases, ShapeMismatch, UnsupportedFormat)
"""Refusals of a move by weights that a fit may get around; what it cannot, it refuses as well."""


@dataclass(frozen=True)
class WeightsElseFit:
    """Two bases, and both ways to move a LoRA between them."""

    pair: BasePair  # by weights
    by_fit: FitOptions  # the options of a fit
    runs: bool  # a fit can run both
    latents: str | None  # why their latents differ; None where they do not
    parts: KeptParts | None  # what the fits of several LoRAs share

    @classmethod
    def of(
        cls,
        source: Base,
        target: Base,
        options: TransferOptions,
        dry_run: bool = False,
        parts: KeptParts | None = None,
    ) -> WeightsElseFit:
        """Looks at the folders; `options` belong to method "best".

        Raises:
            InvalidOption: an option that a fit cannot use.
        """
        for known in fields(options):
            name, value = known.name, getattr(options, known.name)
            if name not in ("method", *OF_A_FIT_TOO) and value != known.default:
                raise InvalidOption(
                    f"`{name}` cannot be chosen with `method='best'`, because a fit cannot use it: "
                    "keep the default there, or choose another method"
                )
        shared = {name: getattr(options, name) for name in OF_A_FIT_TOO}
        fit = FitOptions(**shared, shown_prompts=SHOWN)
        runs, latents = vae.can_fit(source.path, target.path), None
        if fit.look_of_source and not runs:
            raise InvalidOption(
                "`look` needs a fit, which runs both models: give them as folders of whole "
                "diffusers pipelines"
            )
        if runs:
            assert source.path is not None and target.path is not None
            latents = vae.explain_different_latents(source.path, target.path)
        if latents is not None:  # images cross, of which a fit takes more (docs/evidence.md)
            fit = replace(fit, images=2 * fit.images)
        by_weights = replace(options, method="auto", prompts=(), look="target")
        pair = BasePair.open(source, target, by_weights, dry_run=dry_run)
        return cls(pair, fit, runs, latents, parts)

    def run(
        self,
        lora: LoraLike,
        out: str | PathLike[str] | None,
        progress: Progress | None,
        *,
        renews: bool = False,
    ) -> Transfer:
        """Moves a LoRA into memory or to a path; keeps a current result there."""
        pair = replace(self.pair, options=replace(self.pair.options, progress=progress))
        way = replace(self, pair=pair, by_fit=replace(self.by_fit, progress=progress))
        if out is None:
            return way._move(lora)
        # All of a pipeline decides whether a fit is called for.
        digests = watch_pipelines(pair.source, pair.target)
        fit = way.by_fit
        options = replace(pair.options, method=BEST, prompts=fit.prompts, look=fit.look)
        recipe = lora, pair.source, pair.target, options
        return write_or_keep(
            recipe, out, pair.preview, way._move, digest_bases=digests, renews=renews
        )

    def _move(self, lora: LoraLike) -> Transfer:
        """Moves a LoRA by weights or by a fit; the report says why."""
        moved, need = self._try_weights(lambda: self.pair.transfer(lora))
        why = self._explain_no_fit()
        if need:
            try:
                source, target = self.pair.source, self.pair.target
                done = fit_lora(lora, source, target, self.by_fit, self.parts)
                return replace(done, report=_tell_fitted(done.report, need))
            except ProLoRAError as error:
                if isinstance(moved, ProLoRAError):
                    raise
                why = f"A fit was tried because {need}, but: {error}."
        return cast(Transfer, replace(moved, report=_tell_why(moved.report, why)))

    def preview(self, lora: LoraLike) -> LoraReport:
        """Plans what `run` would do; it reads the weights, which decide."""
        found, need = self._try_weights(lambda: self.pair.preview(lora, weighed=True))
        if not need:
            return _tell_why(found, self._explain_no_fit())
        report = plan_fit(lora, self.pair.source, self.pair.target, self.by_fit)
        return _tell_fitted(report, need)

    def _try_weights(self, step: Callable[[], Any]) -> tuple[Any, str]:
        """Does a step by weights alone; returns its result or refusal, and why a fit is called for.

        Raises:
            ProLoRAError: the refusal, where no fit is called for.
        """
        try:
            found = step() if self.latents is None else UnrelatedBases(self.latents)
        except UNMOVED as error:
            found = error
        need = self.latents or ""
        if self.by_fit.look_of_source and not need:
            need = f"the look of {self.pair.source.name} was asked for"
        if self.runs and not need:
            told = found.report if isinstance(found, Transfer) else found
            need = explain_need(told, self.pair.source, self.pair.target, self.by_fit.target_steps)
        if isinstance(found, ProLoRAError) and not need:
            raise found
        return found, need

    def _explain_no_fit(self) -> str:
        if not self.runs:
            return "No fit was tried: it runs both models, given as folders of whole pipelines."
        return (
            f"No fit was made: all of the LoRA has a place on {self.pair.target.name}, which draws "
            "in many steps as far as its files tell (`target_steps` says otherwise); fits were at "
            "times worse there on test models."
        )


def _tell_fitted(report: LoraReport, need: str) -> LoraReport:
    """Adds to a report of a fit why it is made and its gain."""
    why = f"Both models {'would be' if report.dry_run else 'were'} run because {need}."
    rival = getattr(report, "share_of_rival", None)
    if rival is not None:
        does = f"does {rival:.0%}" if rival > 0 else f"does harm ({rival:.0%})"
        why += f" The LoRA moved by the weights alone {does} on the same samples."
    return _tell_why(report, why)


def _tell_why(report: LoraReport, why: str) -> LoraReport:
    assert isinstance(report, MovedReport)
    return replace(report, asked="best", why=why)
