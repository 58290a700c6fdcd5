"""Two pipelines that are asked the same questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from ..recording.trajectories import Call, Sample
from ..recording.translation import Translation, same_call
from ..settings import FitSettings
from .conditioning import PromptTable, build_call, make_reader, split_call
from .guidance import guide_source
from .latents import LatentLayout, check_shapes
from .pipeline import NO_UPDATES, Pipeline, run_text_encoders_beside, share_size
from .schedules import (
    FLOW,
    NoiseSchedule,
    clip_state,
    common_levels,
    convert_prediction,
    level_log_snr,
    translate_state,
    translate_time,
)


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
    # The LoRA's updates of the source's text encoders
    text: Mapping[str, LowRank] = field(default_factory=dict)

    def samplers(self, on_image: Callable[[str], None]) -> tuple[Sample, Sample, Sample]:
        """Returns samplers of ORIGINS: the source, with its LoRA, the target.

        `on_image` is called with the origin of an image after it.
        """
        return (
            self.source.sampler(self.settings, lambda: on_image("source")),
            self.source.sampler(self.settings, lambda: on_image("adapted"), self.text),
            self.target.sampler(self.of_target, lambda: on_image("target")),
        )


def pair_pipelines(
    source: Pipeline,
    target: Pipeline,
    settings: FitSettings,
    text: Mapping[str, LowRank] = NO_UPDATES,
) -> PipelinePair:
    """Sets the size, and tabulates the conditioning of each model for the prompts.

    Flows of two architectures, and a flow beside another kind of model, are sampled in a few steps
    to see what their times mean. `text` are updates of the source's text encoders, which are run
    with the LoRA.
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
    with run_text_encoders_beside(source, text):
        adapted = source.tabulate_prompts(settings) if text else tables[0]
    latents = tables[0].like.latent, tables[1].like.latent
    layouts = LatentLayout.of(source.pipe, latents[0]), LatentLayout.of(target.pipe, latents[1])
    check_shapes(latents, layouts, names)
    sides = _AskedModel(tables[0], ours, layouts[0]), _AskedModel(tables[1], theirs, layouts[1])

    def clip(call: Call) -> Call:
        return call if levels is None else sides[call.origin == "target"].clip(levels, call)

    translation = Translation(
        partial(sides[0].translate, sides[1]),
        partial(sides[1].translate, sides[0]),
        partial(sides[0].convert, sides[1]),
        make_reader(*latents),
        clip,
        guide_source((source, target), (settings, of_target), tables),
        partial(tables[0].swap_prompts, adapted) if text else same_call,
        partial(adapted.swap_prompts, tables[0]) if text else same_call,
        tables[0].find_prompts if tables[0].guided else None,
    )
    log_snr = None if levels is None else (level_log_snr(levels[1]), level_log_snr(levels[0]))
    return PipelinePair(source, target, settings, of_target, translation, log_snr, text)


class _AskedModel(NamedTuple):
    """A model as calls are translated to it."""

    table: PromptTable
    schedule: NoiseSchedule
    layout: LatentLayout

    def translate(self, other: _AskedModel, call: Call) -> Call:
        """Returns the other's call: same x₀, ε and log-SNR, its own text embeddings."""
        parts = split_call(self.table.model, call)
        prompts = [self.table.prompt_of(parts, i) for i in range(len(parts.latent))]
        time = translate_time(self.schedule, other.schedule, parts.time)
        latent = translate_state(self.schedule, other.schedule, parts.latent, parts.time)
        latent = self.layout.translate(latent, other.layout)
        return other.table.build_call(latent, time, prompts)

    def convert(self, other: _AskedModel, call: Call, prediction: Tensor) -> Tensor:
        """Returns a prediction in the other's terms."""
        parts = split_call(self.table.model, call)
        converted = convert_prediction(
            self.schedule, other.schedule, parts.latent, parts.time, prediction
        )
        return self.layout.translate(converted, other.layout)

    def clip(self, levels: tuple[float, float], call: Call) -> Call:
        """Moves a call to noise levels of both models."""
        model = self.table.model
        parts = split_call(model, call)
        latent, time = clip_state(self.schedule, levels, parts.latent, parts.time)
        if latent is parts.latent:
            return call
        time = time.to(parts.time.dtype if parts.time.is_floating_point() else torch.float32)
        return build_call(model, replace(parts, latent=latent, time=time))
