"""Both ways to move a LoRA, and method "best": by weights, or by a fit where these say too little.

A fit replaces what the weights give only where modules of the LoRA have no place on the target,
where weights move nothing (bases trained apart or built differently, latents that differ), or where
the target draws in few steps. Elsewhere fits were at times worse than the copy (docs/evidence.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .bases import Base, BaseLike, open_pair, vae
from .bases.base import Progress
from .bases.experts import Experts, ExpertsLike, choose_pairs, open_experts, pair_experts
from .errors import (
    InvalidOption,
    ProLoRAError,
    ShapeMismatch,
    UnrelatedBases,
    UnsupportedFormat,
)
from .files.hub import keep_path
from .files.store import digest
from .moving.base_pair import BasePair
from .moving.batch import make_each
from .moving.option_keywords import settle_options, takes_options
from .moving.options import BEST, DEFAULT_OPTIONS, OF_A_FIT_TOO, LoraLike, TransferOptions
from .moving.output_paths import check_distinct, check_results_folder, make_folders, name_output
from .moving.result import Notes, Recipe, Transfer, make_file, pack_plan
from .reports.lora_report import LoraReport, MovedReport
from .reports.outcome import Outcome

if TYPE_CHECKING:
    from .fitting.common_parts import CommonParts
    from .fitting.settings import FitOptions

Naming = Callable[[Path, str], str]
"""(LoRA, digest of all that its result is made of) -> the result's path below the folder."""
UNMOVED = (UnrelatedBases, ShapeMismatch, UnsupportedFormat)
"""Refusals of a move by weights that a fit may get around; what it cannot, it refuses as well."""


@takes_options
def transfer(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    options: TransferOptions = DEFAULT_OPTIONS,
    *,
    out: str | PathLike[str] | None = None,
    dry_run: bool = False,
    **changes: Any,
) -> Transfer:
    """Moves a LoRA to another base model, without training and without data.

    Args:
        lora: a .safetensors file, a PEFT folder, an id on the hub, a state dict, (state dict,
            `peft.LoraConfig`) or an `Adapter`.
        source: the base that the LoRA was trained on: a file, a folder, an id on the hub, a mapping
            name -> tensor, an nn.Module or an opened `Base`.
        target: the base to move to, in any of these forms.
        options: how to move it.
        out: a file to write, or a folder for format "peft"; checked before any work. A result that
            exists, and was made of the same LoRA, bases, options and version, is kept.
        dry_run: say what would be done, from headers alone; nothing is written.
        **changes: single options by name; they win over `options`.

    Returns:
        The LoRA of the target, with the report; after a dry run a report alone.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a file, key or adapter type that cannot be read exactly, or a result that
            `format` cannot hold.
        ShapeMismatch: an update or a pair of weights that does not fit.
        NonFiniteWeights: NaN or Inf, named. All of these before any SVD runs.
        WrongBase: the LoRA belongs to `target` and not to `source`, or the two are one model.
        AlreadyMoved: prolora moved the LoRA before, to another base than `source`.
        OutputExists: something else has the name of `out`.
        OutputError: `out` cannot be written, or is an input.
        TooLittleMemory: max_memory is below what the largest weight needs.
        UnrelatedBases: method "auto", and the weights have nothing in common.
    """
    options = settle_options(options, changes)
    options = options if out is None else options.for_file()
    way = _choose_way(*open_pair(source, target), options, dry_run)
    return pack_plan(way.foresee(lora)) if dry_run else way.run(lora, out, options.progress)


@takes_options
def transfer_many(
    loras: Iterable[str | PathLike[str]],
    source: ExpertsLike | Experts,
    target: ExpertsLike | Experts,
    folder: str | PathLike[str],
    options: TransferOptions = DEFAULT_OPTIONS,
    *,
    naming: Naming | None = None,
    **changes: Any,
) -> list[Outcome]:
    """Moves LoRAs into a folder, under their own names.

    The suffix follows the format. A result that exists, and says in its header that it was made of
    this very LoRA, of these bases and in this way, is kept: a run that was cut off goes on where it
    was. A LoRA whose result's path holds anything else is refused. With `overwrite` either is made
    again. The folder is made if it does not exist.

    Without `cache` what is learnt of the bases is kept for this call only; `progress` is called as
    progress(done, total, "LoRAs: module").

    A model of two experts (Wan 2.2) is given as the folder of its pipeline, or as (high noise, low
    noise). A LoRA whose name has "high_noise" or "low_noise" in it, "HIGH" or "LOW" in capitals, or
    either of these words at its end, is moved to that expert. Any other is moved to both, and the
    names of its results end in "_high_noise" and "_low_noise".

    Args:
        loras: .safetensors files, PEFT folders and ids on the hub.
        source: the base that they were trained on, or its two experts.
        target: the base to move to, or its two experts.
        folder: where the results go.
        options: how to move them.
        naming: gives results other names: it is called with each LoRA and twelve digits that differ
            wherever the LoRA, the size or time of a base, an option or the version does, and
            returns a path below the folder without the suffix.
        **changes: single options by name; they win over `options`.

    Returns:
        An outcome for each LoRA and each expert that it is moved to, in order. A LoRA that is
        refused does not stop the others.

    Raises:
        OutputError: the folder has the name of a file, or cannot be made, or two inputs would have
            one output.
        UnsupportedFormat: the source alone has experts, and a LoRA's name does not tell one.
        ProLoRAError: a base that cannot be opened, or two that cannot be matched by similarity.
    """
    options = settle_options(options, changes).for_file()
    paths, results, refused = [keep_path(lora) for lora in loras], Path(folder), {}
    check_results_folder(folder, len(paths))
    pairs = pair_experts(open_experts(source), open_experts(target))
    moves = [(lora, *chosen) for lora in paths for chosen in choose_pairs(lora, pairs)]
    format, outs = options.format or "auto", []
    for i, (lora, pair, end) in enumerate(moves):
        name = name_output(lora, format, end)
        try:
            if naming is not None:
                made_of = Recipe.of(lora, pair.source, pair.target, options).made_of
                name = naming(lora, digest(made_of)[:12]) + name_output(lora, format, end, stem="")
        except ProLoRAError as error:
            refused[i] = error
        outs.append(results / name)
    live = [i for i in range(len(moves)) if i not in refused]
    check_distinct([moves[i][0] for i in live], [outs[i] for i in live])
    used = {id(pair): pair for _, pair, _ in moves}
    with ExitStack() as stack:
        if options.cache is None and options.chosen.needs_bases and len(moves) > len(used):
            kept = stack.enter_context(tempfile.TemporaryDirectory(prefix="prolora-"))
            options = replace(options, cache=kept)
        ways = {key: _choose_way(one.source, one.target, options) for key, one in used.items()}
        make_folders({results, *(out.parent for out in outs)})
        for way in ways.values():
            if isinstance(way, BasePair):
                way.match_blocks()
        able = [way for way in ways.values() if isinstance(way, BestWay) and way.runs]
        if able:
            from .fitting.common_parts import share_parts

            common = stack.enter_context(share_parts(None, results, len(paths) > 1))
            for way in able:
                way.common = common

        def make(i: int, out: Path, progress: Progress | None) -> Transfer:
            if i in refused:
                raise refused[i]
            return ways[id(moves[i][1])].run(moves[i][0], out, progress)

        return make_each([lora for lora, _, _ in moves], outs, make, options.progress)


def _choose_way(
    source: Base, target: Base, options: TransferOptions, dry_run: bool = False
) -> BasePair | BestWay:
    """Opens the way that the options ask for."""
    if options.method == BEST:
        return BestWay.of(source, target, options, dry_run)
    return BasePair.open(source, target, options, dry_run=dry_run)


@dataclass
class BestWay:
    """Two bases, and both ways to move a LoRA between them."""

    pair: BasePair  # by weights
    by_fit: FitOptions  # the options of a fit
    runs: bool  # a fit can run both
    latents: str | None  # why their latents differ; None where they do not
    common: CommonParts | None = None  # what the fits of several LoRAs share

    @classmethod
    def of(
        cls, source: Base, target: Base, options: TransferOptions, dry_run: bool = False
    ) -> BestWay:
        """Looks at the folders; `options` belong to method "best".

        Raises:
            InvalidOption: an option that a fit cannot use.
            ProLoRAError: this copy of prolora cannot fit.
        """
        try:
            from .fitting.settings import FitOptions
        except ModuleNotFoundError as error:
            raise ProLoRAError(
                f"method 'best' may run the models, and this copy of prolora lacks {error.name}; "
                "choose another method"
            ) from error
        _check_options(options)
        runs, latents = vae.can_fit(source.path, target.path), None
        if runs:
            assert source.path is not None and target.path is not None
            latents = vae.explain_different_latents(source.path, target.path)
        fit = FitOptions(**{name: getattr(options, name) for name in OF_A_FIT_TOO})
        if latents is not None:  # images cross, of which a fit takes more (docs/evidence.md)
            fit = replace(fit, images=2 * fit.images)
        by_weights = replace(options, method="auto")
        return cls(BasePair.open(source, target, by_weights, dry_run=dry_run), fit, runs, latents)

    def run(
        self,
        lora: LoraLike,
        out: str | PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> Transfer:
        """Moves a LoRA into memory or to a path; keeps a result of the same recipe there."""
        by_weights = replace(self.pair.options, progress=progress)
        way = replace(
            self,
            pair=replace(self.pair, options=by_weights),
            by_fit=replace(self.by_fit, progress=progress),
        )
        if out is None:
            return way._move(lora, [None, None])
        ends = lora, self.pair.source, self.pair.target
        return make_file(ends, out, [by_weights, way.by_fit], way.pair.foresee, way._move)

    def _move(self, lora: LoraLike, notes: list[Notes | None]) -> Transfer:
        """Moves a LoRA by weights or by a fit; the report says why."""
        moved, need = self._try_weights(partial(self.pair.transfer, lora, notes[0]))
        if not need:
            told = _tell_why(moved.report, self._explain_no_fit())
            return cast(Transfer, replace(moved, report=told))
        from .fitting.fit_pipelines import fit_to_pipelines

        try:
            ends = lora, self.pair.source, self.pair.target
            done = fit_to_pipelines(*ends, self.by_fit, notes[1], self.common)
            return replace(done, report=_tell_fitted(done.report, need))
        except ProLoRAError as error:
            if isinstance(moved, ProLoRAError):
                raise
            why = f"A fit was tried because {need}, but: {error}."
            return cast(Transfer, replace(moved, report=_tell_why(moved.report, why)))

    def foresee(self, lora: LoraLike) -> LoraReport:
        """Plans what `run` would do; it reads the weights, which decide."""
        found, need = self._try_weights(partial(self.pair.foresee, lora, weighed=True))
        if not need:
            return _tell_why(found, self._explain_no_fit())
        from .fitting.fit_pipelines import plan_fit

        report = plan_fit(lora, self.pair.source, self.pair.target, self.by_fit)
        return _tell_fitted(report, need)

    def _try_weights(self, step: Callable[[], Any]) -> tuple[Any, str]:
        """Does a step by weights alone; returns its result or refusal, and why a fit is called for.

        Raises:
            ProLoRAError: the refusal, where no fit is called for.
        """
        found: Any = UnrelatedBases(self.latents) if self.latents is not None else None
        try:
            found = found or step()
        except UNMOVED as error:
            found = error
        need = self.latents or ""
        if self.runs and self.latents is None:
            from .fitting.fit_plan import explain_need

            told = found.report if isinstance(found, Transfer) else found
            need = explain_need(told, self.pair.source, self.pair.target, self.by_fit.target_steps)
        if isinstance(found, ProLoRAError) and not need:
            raise found
        return found, need

    def _explain_no_fit(self) -> str:
        """Says why the LoRA is moved by weights."""
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
    return replace(report, asked=BEST, why=why)


def _check_options(options: TransferOptions) -> None:
    """Refuses what a fit cannot do.

    Raises:
        InvalidOption: names the option.
    """
    for known in fields(options):
        name, value = known.name, getattr(options, known.name)
        if name not in ("method", *OF_A_FIT_TOO) and value != known.default:
            raise InvalidOption(
                f"`{name}` cannot be chosen with `method='best'`, because a fit cannot use it: "
                "keep the default there, or choose another method"
            )
    if options.text_encoder == "project":
        raise InvalidOption("`text_encoder` must be copy or skip with `method='best'`")
