"""A LoRA fitted to running models: `fit`, from file to file, and several one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from .. import adapters
from ..adapters.trigger_words import read_trigger_words
from ..architectures.modules import is_in_text_encoder
from ..bases import Base, BaseLike, open_base, open_pair
from ..bases.base import Progress
from ..core.lowrank import LowRank
from ..core.precision import in_full_precision
from ..errors import InvalidOption, ProLoRAError, UnrelatedBases
from ..files.hub import keep_path
from ..moving.base_pair import BasePair
from ..reports.outcome import Outcome
from ..reports.report import PictureGrid
from ..verbs.batch import run_each
from ..verbs.option_keywords import resolve_options, takes_options
from ..verbs.options import LoraLike
from ..verbs.output_paths import check_distinct, check_results_folder, make_folders, name_output
from ..verbs.result import Transfer, as_dry_run, list_inputs, write_or_keep
from .default_prompts import derive_prompts
from .finishing import finish_baseline, finish_fit, move_by_weights
from .fit_plan import (
    FitJob,
    explain_serving,
    foresee_work,
    outline_fit,
    prepare_fit,
)
from .fit_report import FitReport, plan_fit
from .gate import COPY, fits_target
from .kept_parts import KeptParts, watch_pipelines
from .models import suited_threads
from .pictures import STEPS, open_pictures, train_on_pictures
from .pipelines.memory_bounds import watch_memory
from .pipelines.pipeline import run_text_encoders_beside
from .pipelines.pipeline_opening import open_both
from .pipelines.pipeline_side import ask_pipelines
from .run import Fitted, fit_sides
from .settings import DEFAULT_FIT, FitOptions
from .showing import ImageGrid
from .workload import Meter

OPENING = "opening both pipelines"


@takes_options
@in_full_precision
def fit(
    lora: LoraLike,
    source: BaseLike | None,
    target: BaseLike,
    options: FitOptions = DEFAULT_FIT,
    *,
    out: str | PathLike[str] | None = None,
    dry_run: bool = False,
    **changes: Any,
) -> Transfer:
    """Fits a LoRA of one model to another that runs: no data and no captions, but both models.

    It reaches targets that moving by weights does not: trained apart, of another width or depth,
    with other latents, without some blocks. Both models are sampled with and without the LoRA, and
    a LoRA of the target is fitted to the change that it makes. Where that is no better on held-out
    samples than the LoRA moved by weights alone, that one is the result.

    With `pictures` it is trained on these instead, without a source.

    Args:
        lora: as `transfer` takes it.
        source: the folder of the diffusers pipeline that the LoRA was trained on, or None.
        target: the folder of the pipeline to fit it to.
        options: what is sampled, and how it is fitted.
        out: a file to write, or a folder for format "peft", as `transfer` takes it.
        dry_run: report what would be done, and whether weights would serve: no model runs.
        **changes: single options by name; they win over `options`.

    Returns:
        The LoRA of the target, with the report; after a dry run a report alone.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a folder that is no pipeline, a file that cannot be read, or a result
            that `format` cannot hold.
        NonFiniteWeights: NaN or Inf, named.
        WrongBase: the LoRA is for another model than `source`.
        AlreadyMoved: prolora moved the LoRA before, to another base than `source`.
        TooLittleMemory: max_memory is below what the models need.
        UnrelatedBases: the held-out samples speak against the fit and against moving by weights.
        OutputExists: something else has the name of `out`.
        OutputError: `out` or the folder of kept parts cannot be written.
    """
    options = resolve_options(options, changes)
    bases = open_bases(source, target, options)
    if dry_run:
        return as_dry_run(plan_fit_by_weights(lora, *bases, options))
    if out is None:
        return fit_lora(lora, *bases, options)
    return _fit_into(lora, *bases, Path(out), options.for_file())


@takes_options
@in_full_precision
def fit_many(
    loras: Iterable[str | PathLike[str]],
    source: BaseLike | None,
    target: BaseLike,
    folder: str | PathLike[str],
    options: FitOptions = DEFAULT_FIT,
    **changes: Any,
) -> list[Outcome]:
    """Fits LoRAs one after the other, into a folder, under the names they have.

    Both models are asked only once what does not depend on the LoRA: what they said without one is
    kept in `resume`, or until the end in a temporary folder inside `folder`.
    A result that is there already, complete, and says in its header that it was made of this very
    LoRA, of these bases and in this way is left alone (unless `overwrite` is set): a run that was
    cut off goes on where it was. The folder is made if it does not exist.

    Args:
        loras: .safetensors files, PEFT folders and ids on the hub.
        source: as `fit` takes it.
        target: likewise.
        folder: where the results go.
        options: what is sampled, and how it is fitted.
        **changes: single options by name; they win over `options`.

    Returns:
        An outcome for each LoRA, in order. One that is refused does not stop the others.

    Raises:
        OutputError: the folder cannot be made, or two inputs would have one output.
        ProLoRAError: a base that cannot be opened.
    """
    options = resolve_options(options, changes).for_file()
    paths = [keep_path(lora) for lora in loras]
    check_results_folder(folder, len(paths))
    old, new = open_bases(source, target, options)
    outs = [Path(folder) / name_output(lora, options.format or "auto") for lora in paths]
    check_distinct(paths, outs)
    make_folders({Path(folder)})
    with KeptParts.share(options.resume, Path(folder), len(paths) > 1) as parts:

        def make(i: int, out: Path, progress: Progress | None) -> Transfer:
            labelled = replace(options, progress=progress)
            return _fit_into(paths[i], old, new, out, labelled, parts)

        return run_each(paths, outs, make, options.progress)


def open_bases(source: BaseLike | None, target: BaseLike, options: FitOptions) -> tuple[Base, Base]:
    """Opens both bases; without a source, which pictures do not need, the target twice."""
    if options.pictures is not None:
        open_pictures(options)
    if source is not None:
        return open_pair(source, target)
    if options.pictures is None:
        raise InvalidOption("`source` is missing: a fit without `pictures` runs both models")
    base = open_base(target)
    return base, base


def _fit_into(
    lora: LoraLike,
    source: Base,
    target: Base,
    out: Path,
    options: FitOptions,
    parts: KeptParts | None = None,
) -> Transfer:
    bases = source, target
    return write_or_keep(
        (lora, source, target, options),
        out,
        lambda opened: plan_fit(opened, *bases, options),
        lambda opened: fit_lora(opened, *bases, options, parts),
        digest_bases=watch_pipelines(*bases),
    )


def plan_fit_by_weights(
    lora: LoraLike, source: Base, target: Base, options: FitOptions
) -> FitReport:
    """Reports as `plan_fit`, and compares the weights to say whether they serve."""
    report = plan_fit(lora, source, target, options)
    if options.pictures is not None:
        work = f"At most {STEPS} steps on the pictures and {options.images} samples of the target."
        unused = open_pictures(options).warnings
        return replace(report, work=work, warnings=(*report.warnings, *unused))
    moving = options.transfer_options("auto")
    try:
        found = BasePair.open(source, target, moving, dry_run=True).preview(lora, weighed=True)
    except ProLoRAError:
        return report
    return replace(report, why=explain_serving(source, target, options, found))


def fit_lora(
    lora: LoraLike,  # what is fitted
    source: Base,  # the base it was trained on
    target: Base,  # the base it goes to
    options: FitOptions,  # how
    parts: KeptParts | None = None,
) -> Transfer:
    """Fits a LoRA to the running models; refuses what it can before loading them.

    What moving by weights alone makes of the LoRA is its baseline: where that does no worse on
    held-out images, it is the result.
    """
    job = prepare_fit(lora, source, target, options)
    written = options.format or "auto", options.dtype
    outline = outline_fit(job.adapter, job.plan, source, target)
    origin = job.adapter.model.of_base(target.model)
    blank = replace(job.adapter, updates=outline, kernels={}, vectors={}, origin=origin, unread={})
    adapters.check_format(blank, written[0])
    if options.pictures is not None:
        trained = train_on_pictures(job, blank, partial(fit_lora, lora, source, target))
        return Transfer(*trained, list_inputs(lora, source, target), *written)
    baseline = move_by_weights(job)
    copied, why = {}, ""
    if baseline is not None:
        found = baseline.refusal or baseline.done.report
        copied, why = baseline.done.adapter.updates, explain_serving(source, target, options, found)
    parts = parts or KeptParts(options.resume)
    try:
        fitted, grid = _run_models(job, copied, parts, why)
    finally:
        parts.end_lora()
    gate, files = fitted.report.gate, list_inputs(lora, source, target)
    if gate.decision == COPY and not options.force:
        if not gate.copy_serves:
            raise UnrelatedBases(f"neither a fit nor moving by weights serves here: {gate.reason}")
        if baseline:
            moved, report = finish_baseline(job, baseline, fitted.report)
            return Transfer(moved, replace(report, grid=grid, why=why), files, *written)
    adapter, fit_report = finish_fit(job, blank, fitted)
    return Transfer(adapter, replace(fit_report, grid=grid, why=why), files, *written)


def _run_models(
    job: FitJob, copied: Mapping[str, LowRank], parts: KeptParts, why: str
) -> tuple[Fitted, PictureGrid | None]:
    """Runs both pipelines: draws for the page, asks, fits and judges."""
    options, card, foreseen = job.options, job.card, foresee_work(job)
    if options.progress:
        work = foreseen.sentence(job.source.name, job.target.name)
        options.progress(0, foreseen.total, f"{why} {work}".strip())
        options.progress(0, foreseen.total, OPENING)
    lora = job.lora
    copied = {name: u for name, u in copied.items() if not is_in_text_encoder(name)}
    words = read_trigger_words(job.adapter.metadata)
    settings = replace(options, prompts=options.prompts or derive_prompts(words))
    settings = replace(settings, precision=card.precision) if card else settings
    with (
        open_both(job, lora, settings) as models,
        suited_threads(model.denoiser for model in models),
    ):
        grid = ImageGrid.of(models, settings, job.shares_latents, bool(lora.carried))
        beside = partial(run_text_encoders_beside, models[0], lora.text)
        grid.draw_source(lora.denoiser, beside)
        theirs, asking = ask_pipelines(*models, settings, lora, job.shares_latents)
        if card is not None and card.samples:
            theirs.at_once = card.samples
        meter = Meter(
            replace(foreseen, settings=settings, target_steps=theirs.settings.steps),
            watch_memory(options.memory_limit),
        )

        def release() -> None:
            """Frees what does not run again once both models were asked."""
            models[0].free()
            if grid.prompts:  # which need the VAE once more
                models[1].move_beside_denoiser("cpu")
            else:
                models[1].free(keeps_denoiser=True)
            if card is not None and models[1].swapping is not None:
                models[1].swapping.keep(card.fitting)

        parts.of_pipelines(job.source, job.target)
        fitted = fit_sides(asking, settings, copied, meter=meter, parts=parts, release=release)
        grid.draw_target(
            copied if fits_target(models[1].denoiser, copied) else {},
            fitted.scaled if fitted.report.trust else None,
        )
    report = replace(
        fitted.report,
        not_drawn=grid.failure,
        derived_prompts=() if options.prompts else settings.prompts,
        seconds=fitted.report.seconds | ({"show": grid.seconds} if grid.prompts else {}),
    )
    updates = {name: update.to("cpu") for name, update in fitted.updates.items()}
    return replace(fitted, updates=updates, report=report), grid.to_page(
        job.source.name, job.target.name
    )
