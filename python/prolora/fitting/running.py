"""Both pipelines of a fit, opened and run: one after the other, and no longer than needed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..adapters.training_words import read_training_words
from ..architectures.modules import is_in_text_encoder
from ..bases import vae
from ..bases.memory import resident_bytes
from ..bases.pipeline_files import draws_in_few_steps
from ..core.lowrank import LowRank
from ..core.validation import DeviceLike
from ..errors import InvalidOption, TooLittleMemory
from ..files.sizes import format_size
from ..reports.report import PictureGrid
from . import pipelines
from .checkpoint import Checkpoints, hash_updates
from .common_parts import CommonParts
from .default_prompts import derive_prompts
from .fit_numbers import ProbeReport
from .fit_plan import FitJob, LoraParts, foresee_work
from .gate import fits_target
from .models import check_models
from .pipelines import CardPlan, CrossingRecorder, Pipeline
from .pipelines.schedules import FLOW
from .recording.recorder import Recorder, hash_origins
from .run import fit_from_recorder
from .settings import FitSettings
from .showing import ImageGrid
from .workload import WorkMeter

OPENING = "opening both pipelines"


def fit_models(
    job: FitJob, rival: Mapping[str, LowRank], common: CommonParts
) -> tuple[dict[str, LowRank], ProbeReport, PictureGrid | None]:
    """Runs the pipelines and fits: target module -> update, report, images.

    `rival` are the updates that the target would get by weights alone, if any; `common` are the
    pipelines as another fit has left them, and where results are kept.
    """
    source, target, options, card = job.source, job.target, job.options, job.card
    foreseen = foresee_work(source, target, options)
    if options.progress:
        total = sum(map(sum, foreseen.predictions.values()))
        work = foreseen.sentence(source.name, target.name)
        options.progress(0, total, f"{job.serves} {work}".strip())
        options.progress(0, total, OPENING)
    asked = LoraParts.of(job)
    moved = {name: u for name, u in rival.items() if not is_in_text_encoder(name)}
    assert source.path is not None and target.path is not None
    shared = vae.explain_different_latents(source.path, target.path) is None
    with contextlib.ExitStack() as stack:
        models = _open_both(job, asked, common, stack)
        sampled: FitSettings = replace(options, prompts=_choose_prompts(job))
        if card is not None:
            sampled = replace(sampled, precision=card.precision)
        grid = ImageGrid.of(models, sampled, shared, bool(asked.carried))
        beside = partial(pipelines.run_text_encoders_beside, models[0], asked.text)
        grid.draw_source(asked.denoiser.updates, beside)
        of_target = models[1].derive_target_settings(sampled)
        meter = WorkMeter(replace(foreseen, settings=sampled, target_steps=of_target.steps))
        loaded = resident_bytes()

        def count_image(origin: str) -> None:
            meter.count_image(origin)
            if options.memory_limit is not None:
                _check_recorded(options.memory_limit, loaded, meter)

        def release() -> None:
            """Frees what does not run again once both models were asked."""
            models[0].release(keep_denoiser=False)
            models[1].release(keep_denoiser=True)
            if card is not None and models[1].swapping is not None:
                models[1].swapping.keep(card.fitting)

        # Between a flow and another path, and for a target of few steps, the images of the
        # samplings say more than their calls.
        mixed = len({model.schedule.kind == FLOW for model in models}) > 1
        few = pipelines.takes_few_steps(sampled, of_target)
        make = _record_images if not shared or mixed or few else _record_calls
        check_models(models[0].denoiser, models[1].denoiser, asked.denoiser)
        checkpoints = common.open_checkpoints(source, target)
        recorder, log_snr = make(models, sampled, asked, shared, checkpoints, count_image)
        samples = card.samples if card else None
        result = fit_from_recorder(recorder, moved, sampled, release, meter, samples)
        report = result.report
        copied = moved if fits_target(models[1].denoiser, moved) else {}
        grid.draw_target(copied, result.adapter.updates if report.trust else None)
    report.log_snr, report.not_drawn = log_snr, grid.failure
    report.derived_prompts = () if options.prompts else sampled.prompts
    if grid.prompts:
        report.seconds["show"] = grid.seconds
    fitted = {name: update.to("cpu") for name, update in result.adapter.updates.items()}
    return fitted, report, grid.to_page(source.name, target.name)


def _record_calls(
    models: tuple[Pipeline, Pipeline],
    sampled: FitSettings,
    asked: LoraParts,
    shared: bool,
    checkpoints: Checkpoints,
    on_image: Callable[[str], None],
) -> tuple[Recorder, tuple[float, float] | None]:
    """Returns what records the calls of pipelines with the same latents, and its log-SNR."""
    del shared  # they are
    pair = pipelines.pair_pipelines(*models, sampled, asked.text)
    keys = _hash_origins(models, (pair.settings, pair.of_target), asked, checkpoints)
    recorder = Recorder(
        pair.source.denoiser,
        pair.target.denoiser,
        asked.denoiser,
        pair.samplers(on_image),
        pair.translation,
        checkpoints,
        keys,
    )
    return recorder, pair.log_snr


def _record_images(
    models: tuple[Pipeline, Pipeline],
    sampled: FitSettings,
    asked: LoraParts,
    shared: bool,
    checkpoints: Checkpoints,
    on_image: Callable[[str], None],
) -> tuple[CrossingRecorder, tuple[float, float]]:
    """Returns what asks both models about images, and its log-SNR."""
    sides = pipelines.observe_sides(*models, sampled, shared)
    keys = _hash_origins(models, (sides[0].settings, sides[1].settings), asked, checkpoints)
    recorder = CrossingRecorder(*sides, asked.denoiser, checkpoints, keys, on_image, asked.text)
    return recorder, recorder.log_snr


def _hash_origins(
    models: tuple[Pipeline, Pipeline],
    settings: tuple[FitSettings, FitSettings],
    asked: LoraParts,
    checkpoints: Checkpoints,
) -> dict[str, str]:
    """Hashes what each origin's samplings depend on, for kept results."""
    if checkpoints.folder is None:
        return hash_origins({}, "")
    samplers = json.dumps([*map(pipelines.describe_pipeline, models, settings)])
    samplers += hash_updates(asked.carried) if asked.carried else ""
    return hash_origins({**asked.denoiser.updates, **asked.text}, samplers)


def _choose_prompts(job: FitJob) -> tuple[str, ...]:
    """Returns the given prompts, or else prompts from the LoRA's header."""
    return job.options.prompts or derive_prompts(read_training_words(job.adapter.metadata))


def _open_both(
    job: FitJob, asked: LoraParts, common: CommonParts, stack: contextlib.ExitStack
) -> tuple[Pipeline, Pipeline]:
    """Opens both pipelines in turn: the first's text encoders make room.

    `stack` keeps what runs beside text encoders in place.
    """
    source, target, options = job.source.path, job.target.path, job.options
    assert source is not None and target is not None
    sampled = replace(options, prompts=_choose_prompts(job))
    # Blocks that were swapped are not read again in place.
    common.make_room(anew=job.card is not None)
    if options.memory_limit is not None:
        _check_memory(options.memory_limit, source, target, options.device)
    models: list[Pipeline] = []
    for side, path in (("source", source), ("target", target)):
        # Text encoders of a pipeline on a bounded card run in the machine's memory.
        model = common.open(side, path, None if job.card else options.device)
        stack.enter_context(pipelines.run_text_encoders_beside(model, asked.carried))
        if side == "source":
            with pipelines.run_text_encoders_beside(model, asked.text):
                model.encode_prompts(sampled)
            model.encode_prompts(sampled)
        else:
            model.few_steps = bool(draws_in_few_steps(job.target))
            model.encode_prompts(model.derive_target_settings(sampled))
        model.release_encoders()
        if job.card is not None and options.device is not None:
            model.move_to_card(str(options.device), job.card.rooms[len(models)], job.card.tile)
        else:
            model.restore()
        models.append(model)
    return models[0], models[1]


def plan_memory_of_card(job: FitJob) -> CardPlan | None:
    """Plans how the pipelines run within `max_vram`; None without such a bound."""
    options, source, target = job.options, job.source.path, job.target.path
    if options.card_limit is None:
        return None
    if not _is_card(options.device):
        raise InvalidOption(
            "`max_vram` bounds the memory of a card, and this fit runs on the CPU; `max_memory` "
            "bounds the machine's"
        )
    assert source is not None and target is not None
    own = max((update.rank for update in job.adapter.updates.values()), default=1)
    rank = int(options.rank) if options.rank and options.rank >= 1 else own
    decodes = vae.explain_different_latents(source, target) is not None
    return pipelines.plan_card(
        options.card_limit, (source, target), options, max(rank, own), decodes
    )


def _is_card(device: DeviceLike) -> bool:
    """Returns whether a device has memory of its own."""
    return device is not None and torch.device(device).type != "cpu"


def _check_memory(limit: int, source: Path, target: Path, device: DeviceLike) -> None:
    """Refuses a bound that the models alone exceed, before they are loaded."""
    (ours, others), (theirs, rest) = (pipelines.estimate_bytes(path) for path in (source, target))
    on_host = not _is_card(device)
    least = resident_bytes() + max(ours + others, theirs + rest + (others if on_host else 0))
    if least > limit:
        raise TooLittleMemory(
            f"a bound of {format_size(limit)} on memory is too little: the two pipelines alone "
            f"need {format_size(least)} at a time"
        )


def _check_recorded(limit: int, loaded: int, meter: WorkMeter) -> None:
    """Refuses a bound that sampled images and their calls exceed."""
    taken = resident_bytes()
    if taken > limit:
        share = meter.images / sum(meter.workload.images)
        needed = loaded + (taken - loaded) / share
        raise TooLittleMemory(
            f"a bound of {format_size(limit)} on memory is too little: with what is recorded of "
            f"{share:.0%} of the images this run takes {format_size(taken)}, and will need about "
            f"{format_size(needed)}; sample fewer images, or in fewer steps"
        )
