"""Both ways to move a LoRA, and method "best": by weights, or by a fit where these say too little.

A fit replaces what the weights give only where modules of the LoRA have no place on the target,
where weights move nothing (bases trained apart or built differently, latents that differ), or where
the target draws in few steps. Elsewhere fits were at times worse than the copy (docs/evidence.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bases import Base, BaseLike, open_pair, vae
from .bases.base import Progress
from .bases.experts import (
    ExpertPair,
    Experts,
    ExpertsLike,
    choose_pairs,
    open_experts,
    pair_experts,
)
from .core.precision import in_full_precision
from .errors import (
    InvalidOption,
    LowCoverage,
    ProLoRAError,
    ShapeMismatch,
    UnrelatedBases,
    UnsupportedFormat,
)
from .files.hub import keep_path
from .moving.base_pair import Notes, move_lora
from .moving.batch import Naming, make_each, move_many
from .moving.dry_run import keep_known_cache, plan_report
from .moving.option_keywords import settle_options, takes_options
from .moving.options import BEST, DEFAULT_OPTIONS, OF_A_FIT_TOO, LoraLike, TransferOptions
from .moving.output_paths import check_distinct, check_results_folder, make_folders, name_output
from .moving.result import Transfer, pack_plan
from .moving.resume import make_file
from .reports.lora_report import LoraReport, MovedReport
from .reports.outcome import Outcome

if TYPE_CHECKING:
    from .fitting.common_parts import CommonParts
    from .fitting.fit_options import FitOptions

UNMOVED = (UnrelatedBases, ShapeMismatch, UnsupportedFormat, LowCoverage)
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
        OutputError: `out` cannot be written, or is an input; out_rank is a size that one column a
            module exceeds.
        TooLittleMemory: max_memory is below what the largest weight needs.
        UnrelatedBases: method "auto", and the weights have nothing in common.
        LowCoverage: fewer modules moved than `min_coverage` asks for.
    """
    options = settle_options(options, changes)
    bases = open_pair(source, target)
    if options.method == BEST:
        return BestWay.of(*bases, options).run(lora, out, dry_run=dry_run)
    if dry_run:
        return pack_plan(plan_report(lora, *bases, options))
    if out is None:
        return move_lora(lora, *bases, options)
    options = options.for_file()
    return make_file(
        (lora, *bases),
        out,
        [options],
        lambda opened: plan_report(opened, *bases, options),
        lambda opened, notes: move_lora(opened, *bases, options, notes[0]),
    )


@takes_options
@in_full_precision
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
    paths = [keep_path(lora) for lora in loras]
    check_results_folder(folder, len(paths))
    old, new = open_experts(source), open_experts(target)
    pairs = pair_experts(old, new)
    if options.method != BEST:
        return move_many(paths, pairs, folder, options, naming)
    if naming is not None:
        raise InvalidOption("results of method 'best' keep their names: leave `naming` out")
    return _move_best(paths, pairs, Path(folder), options)


def _move_best(
    loras: list[Path], pairs: list[ExpertPair], folder: Path, options: TransferOptions
) -> list[Outcome]:
    """Moves one LoRA after the other; what a fit asks without one is asked once."""
    ways = {id(pair): BestWay.of(pair.source, pair.target, options) for pair in pairs}
    moves = [(lora, *chosen) for lora in loras for chosen in choose_pairs(lora, pairs)]
    paths = [lora for lora, _, _ in moves]
    outs = [folder / name_output(lora, options.format or "auto", end) for lora, _, end in moves]
    check_distinct(paths, outs)
    make_folders({folder})
    runs = any(way.runs for way in ways.values())
    with _share_parts(folder, len(loras) > 1) if runs else nullcontext() as common:

        def make(i: int, out: Path, progress: Progress | None) -> Transfer:
            way = ways[id(moves[i][1])].labelled(progress)
            return way.run(moves[i][0], out, common=common)

        return make_each(paths, outs, make, options.progress)


def _share_parts(folder: Path, several: bool) -> Any:
    from .fitting.common_parts import share_parts

    return share_parts(None, folder, several)


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
        """Looks at the folders; `options` belong to method "best".

        Raises:
            InvalidOption: an option that a fit cannot use.
            ProLoRAError: this copy of prolora cannot fit.
        """
        try:
            from .fitting.fit_options import FitOptions
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
        return cls(source, target, replace(options, method="auto"), fit, runs, latents)

    def labelled(self, progress: Progress | None) -> BestWay:
        """Returns the same with another callback."""
        weights = replace(self.by_weights, progress=progress)
        return replace(self, by_weights=weights, by_fit=replace(self.by_fit, progress=progress))

    def run(
        self,
        lora: LoraLike,
        out: str | PathLike[str] | None = None,
        *,
        dry_run: bool = False,
        common: CommonParts | None = None,
    ) -> Transfer:
        """Moves a LoRA, or plans it; arguments as in `transfer`."""
        if dry_run:
            way = replace(self, by_weights=keep_known_cache(self.by_weights))
            return pack_plan(way._plan(lora))
        if out is None:
            return self._move(lora, [None, None], common)
        way = replace(self, by_weights=self.by_weights.for_file(), by_fit=self.by_fit.for_file())
        return make_file(
            (lora, self.source, self.target),
            out,
            [way.by_weights, way.by_fit],
            lambda opened: plan_report(opened, self.source, self.target, way.by_weights),
            lambda opened, notes: way._move(opened, notes, common),
        )

    def _move(
        self, lora: LoraLike, notes: list[Notes | None], common: CommonParts | None
    ) -> Transfer:
        """Moves a LoRA by weights or by a fit; the report says why."""
        moved = self._try_weights(lora, notes[0])
        need = self.explain_need(moved.report if isinstance(moved, Transfer) else moved)
        if need:
            from .fitting import fit_pipelines as pipeline

            try:
                ends = lora, self.source, self.target
                done = pipeline.fit_to_pipelines(*ends, self.by_fit, notes[1], common)
                return replace(done, report=_tell_fitted(done.report, need))
            except ProLoRAError as error:
                if isinstance(moved, ProLoRAError):
                    raise
                why = f"A fit was tried because {need}, but: {error}."
                return replace(moved, report=_tell_why(moved.report, why))
        if isinstance(moved, ProLoRAError):
            raise moved
        return replace(moved, report=self._tell_weights(moved.report))

    def _plan(self, lora: LoraLike) -> LoraReport:
        """Plans what `_move` would do; it reads the weights, which decide."""
        moved = self._try_weights(lora)
        found = moved.report if isinstance(moved, Transfer) else moved
        need = self.explain_need(found)
        if need:
            from .fitting import fit_pipelines as pipeline

            report = pipeline.plan_fit(lora, self.source, self.target, self.by_fit)
            return _tell_fitted(report, need)
        if isinstance(found, ProLoRAError):
            raise found
        return replace(self._tell_weights(found), dry_run=True)

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
        from .fitting.fit_plan import explain_need

        return explain_need(found, self.source, self.target, self.by_fit.target_steps)

    def _tell_weights(self, report: LoraReport) -> LoraReport:
        """Adds to a report of a move by weights why no fit was made."""
        if not self.runs:
            why = "No fit was tried: it runs both models, given as folders of whole pipelines."
        else:
            from .fitting.fit_plan import foresee_work

            images = foresee_work(self.source, self.target, self.by_fit).as_images
            why = (
                f"No fit was made: all of the LoRA has a place on {self.target.name}, which draws "
                "in many steps as far as its files tell (`target_steps` says otherwise); fits were "
                "at times worse there on test models. One would take about as long as drawing "
                f"{images:,} images with {self.source.name}."
            )
        return _tell_why(report, why)


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
