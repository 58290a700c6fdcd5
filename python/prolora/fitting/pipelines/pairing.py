"""Two pipelines that are asked the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ..recording.trajectories import Call, Sample
from ..recording.translation import Translation, same_call
from ..settings import FitSettings
from .conditioning import PredictionReader, PromptTable, build_call, split_call
from .conversion import (
    clip_state,
    common_levels,
    convert_prediction,
    translate_state,
    translate_time,
)
from .guidance import guide_source
from .latent_layouts import LatentLayout, check_shapes
from .pipeline import Pipeline, describe_pipeline, share_size
from .schedules import FLOW, NoiseSchedule, level_log_snr
from .text_part import PromptSwapper, TextPart


@dataclass(frozen=True)
class PipelinePair:
    """Two pipelines that can be asked the same questions."""

    source: Pipeline  # the pipeline that the LoRA was made for
    target: Pipeline  # the other one
    settings: FitSettings  # with the size set
    of_target: FitSettings  # the same, with the target's steps and guidance
    translation: Translation  # turns the source's calls and predictions into the target's
    # The lowest and highest log-SNR at which both are asked, for models that predict different
    # quantities; None without a bound.
    log_snr: tuple[float, float] | None = None
    # What the LoRA changes of the source's text encoders; None for nothing
    text_part: TextPart | None = None

    def samplers(self, on_image: Callable[[str], None]) -> tuple[Sample, Sample, Sample]:
        """Returns samplers of ORIGINS: the source, with its LoRA, the target.

        `on_image` is called with the origin of an image after it.
        """
        adapted = self.source if self.text_part is None else self.text_part
        return (
            self.source.sampler(self.settings, lambda: on_image("source")),
            adapted.sampler(self.settings, lambda: on_image("adapted")),
            self.target.sampler(self.of_target, lambda: on_image("target")),
        )

    def describe_sampling(self) -> str:
        """Describes the samplers in a text: part of the keys of recorded calls."""
        sides = ((self.source, self.settings), (self.target, self.of_target))
        return json.dumps([describe_pipeline(*side) for side in sides])


def pair_pipelines(
    source: Pipeline,
    target: Pipeline,
    settings: FitSettings,
    text_updates: Mapping[str, LowRank] | None = None,
) -> PipelinePair:
    """Sets the size, and tabulates the conditioning of each model for the prompts.

    Flows of two architectures, and a flow beside another kind of model, are sampled in a few steps
    to see what their times mean. `text_updates` of the source's text encoders are run with the
    LoRA.

    Raises:
        UnsupportedFormat: the times or predictions of a flow cannot be read.
        ProLoRAError: the latents have different shapes.
    """
    names = source.name, target.name
    settings = share_size(settings, source, target)
    of_target = target.derive_target_settings(settings)
    ours, theirs = source.schedule, target.schedule
    alike = type(source.denoiser) is type(target.denoiser) and ours.kind == theirs.kind
    if not alike and FLOW in (ours.kind, theirs.kind):
        ours = source.observe_schedule(settings)
        theirs = target.observe_schedule(of_target)
    levels = common_levels(ours, theirs)
    tables = source.tabulate_prompts(settings), target.tabulate_prompts(of_target)
    part = TextPart.of(source, text_updates or {}, settings)
    latents = tables[0].like.latent, tables[1].like.latent
    layouts = LatentLayout.of(source.pipe, latents[0]), LatentLayout.of(target.pipe, latents[1])
    check_shapes(latents, layouts, names)
    translation = Translation(
        _CallTranslator(*tables, ours, theirs, *layouts),
        _CallTranslator(tables[1], tables[0], theirs, ours, layouts[1], layouts[0]),
        _PredictionConverter(source.denoiser, ours, theirs, *layouts),
        PredictionReader.of(*latents),
        same_call if levels is None else _CallClipper(source, target, ours, theirs, levels),
        guide_source((source, target), (settings, of_target), tables),
        same_call if part is None else PromptSwapper(tables[0], part.table),
        same_call if part is None else PromptSwapper(part.table, tables[0]),
        _PromptFinder(tables[0]) if tables[0].guided else None,
    )
    log_snr = None if levels is None else (level_log_snr(levels[1]), level_log_snr(levels[0]))
    return PipelinePair(source, target, settings, of_target, translation, log_snr, part)


@dataclass(frozen=True)
class _CallTranslator:
    """A call of one model -> the other's: same x₀, ε and log-SNR, its own text embeddings."""

    ours: PromptTable
    theirs: PromptTable
    schedule: NoiseSchedule
    their_schedule: NoiseSchedule
    layout: LatentLayout
    their_layout: LatentLayout

    def __call__(self, call: Call) -> Call:
        parts = split_call(self.ours.model, call)
        prompts = [self.ours.prompt_of(parts, i) for i in range(len(parts.latent))]
        time = translate_time(self.schedule, self.their_schedule, parts.time)
        latent = translate_state(self.schedule, self.their_schedule, parts.latent, parts.time)
        latent = self.layout.translate(latent, self.their_layout)
        return self.theirs.build_call(latent, time, prompts)


@dataclass(frozen=True)
class _PromptFinder:
    """A finder of the samples with a prompt in a model's call."""

    table: PromptTable

    def __call__(self, call: Call) -> list[bool]:
        parts = split_call(self.table.model, call)
        return [self.table.has_prompt(parts, i) for i in range(len(parts.latent))]


@dataclass(frozen=True)
class _CallClipper:
    """A mover of recorded calls to noise levels of both models."""

    source: Pipeline
    target: Pipeline
    schedule: NoiseSchedule
    their_schedule: NoiseSchedule
    levels: tuple[float, float]

    def __call__(self, call: Call) -> Call:
        of_target = call.origin == "target"
        model = (self.target if of_target else self.source).denoiser
        schedule = self.their_schedule if of_target else self.schedule
        parts = split_call(model, call)
        latent, time = clip_state(schedule, self.levels, parts.latent, parts.time)
        if latent is parts.latent:
            return call
        time = time.to(parts.time.dtype if parts.time.is_floating_point() else torch.float32)
        return build_call(model, replace(parts, latent=latent, time=time))


@dataclass(frozen=True)
class _PredictionConverter:
    """A prediction of the source -> the one in the target's terms."""

    model: nn.Module
    ours: NoiseSchedule
    theirs: NoiseSchedule
    layout: LatentLayout
    their_layout: LatentLayout

    def __call__(self, call: Call, prediction: Tensor) -> Tensor:
        parts = split_call(self.model, call)
        converted = convert_prediction(self.ours, self.theirs, parts.latent, parts.time, prediction)
        return self.layout.translate(converted, self.their_layout)
