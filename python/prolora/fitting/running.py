"""Both pipelines of a fit, opened and run: one after the other, and no longer than needed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..adapters.training_words import read_training_words
from ..architectures.modules import is_in_text_encoder
from ..bases import vae
from ..bases.memory import resident_bytes
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
from .run import ProbeTransfer, fit_from_recorder
from .settings import FitSettings
from .showing import ImageGrid
from .workload import SHOW, WorkMeter

OPENING = "opening both pipelines"


@dataclass(frozen=True)
class _RunningFit:
    """A fit with both models at hand."""

    models: tuple[Pipeline, Pipeline]
    sampled: FitSettings
    asked: LoraParts
    rival: Mapping[str, LowRank]  # the target's updates in its UNet or transformer without a fit
    grid: ImageGrid  # images for a page
    checkpoints: Checkpoints
    meter: WorkMeter
    card: CardPlan | None

    def fit_pair(self) -> ProbeTransfer:
        """Fits between pipelines with the same latents."""
        pair = pipelines.pair_pipelines(*self.models, self.sampled, self.asked.text)
        recorder = Recorder(
            pair.source.denoiser,
            pair.target.denoiser,
            self.asked.denoiser,
            pair.samplers(self.meter.count_image),
            pair.translation,
            self.checkpoints,
            self._hash_origins((pair.settings, pair.of_target)),
        )
        return self._fit(recorder, pair.log_snr)

    def fit_crossing(self, shared: bool) -> ProbeTransfer:
        """Fits by images that cross; `shared` says that both have the same latents."""
        models = self.models
        check_models(models[0].denoiser, models[1].denoiser, self.asked.denoiser)
        ours, theirs = pipelines.observe_sides(*models, self.sampled, shared)
        recorder = pipelines.CrossingRecorder(
            ours,
            theirs,
            self.asked.denoiser,
            self.checkpoints,
            self._hash_origins((ours.settings, theirs.settings)),
            self.meter.count_image,
            self.asked.text,
        )
        return self._fit(recorder, recorder.log_snr)

    def _hash_origins(self, settings: tuple[FitSettings, FitSettings]) -> dict[str, str]:
        """Hashes what each origin's samplings depend on, for kept results."""
        if self.checkpoints.folder is None:
            return hash_origins({}, "")
        samplers = json.dumps([*map(pipelines.describe_pipeline, self.models, settings)])
        samplers += hash_updates(self.asked.carried) if self.asked.carried else ""
        return hash_origins({**self.asked.denoiser.updates, **self.asked.text}, samplers)

    def _fit(
        self, recorder: Recorder | CrossingRecorder, log_snr: tuple[float, float] | None
    ) -> ProbeTransfer:
        samples = self.card.samples if self.card else None
        how = self.sampled, self._release, self.meter, samples
        result = fit_from_recorder(recorder, self.rival, *how)
        result.report.log_snr = log_snr
        return result

    def _release(self) -> None:
        """Frees what does not run again once both models were asked: all but the target's denoiser.

        The source is shown before.
        """
        source, target = self.models
        if self.grid.prompts:
            self.meter.begin(SHOW)
            self._show_source()
        source.release(keep_denoiser=False)
        target.release(keep_denoiser=True)
        if self.card is not None and target.swapping is not None:
            target.swapping.keep(self.card.fitting)

    def _show_source(self) -> None:
        """Draws the source, with the LoRA's part beside its text encoders."""
        text = partial(pipelines.run_text_encoders_beside, self.models[0], self.asked.text)
        self.grid.draw_source(self.asked.denoiser.updates, text)

    def show_result(self, result: ProbeTransfer) -> None:
        """Draws the rest of the grid, where one is asked for; the report gets the time."""
        report, started = result.report, time.perf_counter()
        if self.grid.prompts:
            self._show_source()
            copied = self.rival if fits_target(self.models[1].denoiser, self.rival) else {}
            self.grid.draw_target(copied, result.adapter.updates if report.trust else None)
            report.not_drawn = self.grid.failure
            spent = time.perf_counter() - started
            report.seconds[SHOW] = report.seconds.get(SHOW, 0.0) + spent


def fit_models(
    job: FitJob, rival: Mapping[str, LowRank], common: CommonParts
) -> tuple[dict[str, LowRank], ProbeReport, PictureGrid | None]:
    """Runs the pipelines and fits: target module -> update, report, images.

    `rival` are the updates that the target would get by weights alone, if any; `common` are the
    pipelines as another fit has left them, and where results are kept.
    """
    source, target, options = job.source, job.target, job.options
    foreseen = foresee_work(source, target, options)
    if options.progress:
        total = sum(map(sum, foreseen.predictions.values()))
        work = foreseen.sentence(source.name, target.name)
        options.progress(0, total, f"{job.serves} {work}".strip())
        options.progress(0, total, OPENING)
    asked = LoraParts.of(job.adapter, source, target, options.text_encoder)
    moved = {name: u for name, u in rival.items() if not is_in_text_encoder(name)}
    assert source.path is not None and target.path is not None
    shared = vae.explain_different_latents(source.path, target.path) is None
    with contextlib.ExitStack() as stack:
        models = _open_both(job, asked, common, stack)
        takes_prompts = all("prompt" in model.accepted for model in models)
        derived = _choose_prompts(job) if takes_prompts and not options.prompts else ()
        sampled: FitSettings = replace(options, prompts=options.prompts or derived)
        if job.card is not None:
            sampled = replace(sampled, precision=job.card.precision)
        grid = ImageGrid.of(models, sampled, shared, bool(asked.carried))
        checkpoints = common.open_checkpoints(source, target)
        if options.memory_limit is not None:
            sampled = replace(sampled, max_memory=_memory_left(options.memory_limit))
        of_target = models[1].derive_target_settings(sampled)
        meter = WorkMeter(replace(foreseen, settings=sampled, target_steps=of_target.steps))
        fit = _RunningFit(models, sampled, asked, moved, grid, checkpoints, meter, job.card)
        # Between a flow and another path, and for a target of few steps, the images of the
        # samplings say more than their calls.
        mixed = len({model.schedule.kind == FLOW for model in models}) > 1
        crosses = not shared or mixed or pipelines.takes_few_steps(sampled, of_target)
        result = fit.fit_crossing(shared) if crosses else fit.fit_pair()
        fit.show_result(result)
    shown = grid.to_page(source.name, target.name)
    fitted = {name: update.to("cpu") for name, update in result.adapter.updates.items()}
    result.report.derived_prompts = derived
    return fitted, result.report, shown


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
    encoded = sampled.prompts, asked.text, asked.carried
    if job.card is not None:
        common.forget_models()  # blocks that were swapped are not read again in place
    common.make_room(encoded, options.memory_limit is not None)
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


def _memory_left(limit: int) -> int:
    """Returns the memory that a bound leaves for calls and streams.

    Once the models are loaded.
    """
    taken = resident_bytes()
    if taken >= limit:
        raise TooLittleMemory(
            f"a bound of {format_size(limit)} on memory is too little: the two pipelines alone "
            f"take {format_size(taken)}"
        )
    return limit - taken
