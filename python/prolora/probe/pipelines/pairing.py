"""Two pipelines that are asked the same questions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...errors import ProLoRAError
from ..recording.trajectories import Call, output_of
from ..recording.translation import Translation
from ..settings import Probing
from . import schedules
from .conditioning import PromptTable, split_call
from .pipeline import Pipeline
from .schedules import Schedule

_FIT_SETTINGS = (
    "force",
    "resume",
    "strategy",
    "start",
    "fit_steps",
)  # samples do not depend on them


@dataclass(frozen=True)
class PipelinePair:
    """Two pipelines that can be asked the same questions.

    Attributes:
        source: the pipeline that the LoRA was made for.
        target: the other one.
        settings: with the size set.
        translation: turns calls and predictions of one into those of the other.
    """

    source: Pipeline
    target: Pipeline
    settings: Probing
    translation: Translation

    def describe_sampling(self) -> str:
        """What the samplers do, as a text: part of the keys of recorded calls."""
        settings = {k: v for k, v in vars(self.settings).items() if k not in _FIT_SETTINGS}
        schedulers = [
            (type(p.pipe).__name__, type(p.pipe.scheduler).__name__, dict(p.pipe.scheduler.config))
            for p in (self.source, self.target)
        ]
        return json.dumps([settings, schedulers], default=str)


def pair_pipelines(
    source: Pipeline, target: Pipeline, settings: Probing, of_target: Probing | None = None
) -> PipelinePair:
    """Sets the size and tabulates the conditioning of each model for the prompts.

    Args:
        source: the pipeline that the LoRA was made for.
        target: the other one.
        settings: what is sampled.
        of_target: steps and guidance of the target where they are its own; None: as `settings`.

    Raises:
        UnsupportedFormat: the predictions cannot be converted into each other.
        ProLoRAError: the latents have different numbers of channels.
    """
    names = source.name, target.name
    same = type(source.denoiser) is type(target.denoiser)
    schedules.check_schedules(source.schedule, target.schedule, same, names)
    channels = [p.channels for p in (source, target)]
    if channels[0] != channels[1]:
        raise ProLoRAError(
            f"{names[0]} denoises {channels[0]} channels and {names[1]} {channels[1]}: they cannot "
            "be asked the same question"
        )
    if settings.size is None:
        sizes = [p.size for p in (source, target)]
        known = [size for size in sizes if size is not None]
        settings = replace(settings, size=min(known) if known else None)
    ours = source.tabulate_prompts(settings)
    theirs = target.tabulate_prompts(replace(of_target or settings, size=settings.size))
    translation = Translation(
        _CallTranslator(ours, theirs, source.schedule, target.schedule),
        _CallTranslator(theirs, ours, target.schedule, source.schedule),
        _PredictionConverter(source.denoiser, source.schedule, target.schedule),
        _PredictionReader(channels[0]),
    )
    return PipelinePair(source, target, settings, translation)


@dataclass(frozen=True)
class _CallTranslator:
    """A call of one model -> the other's: same latents and noise, its own text embeddings."""

    ours: PromptTable
    theirs: PromptTable
    schedule: Schedule
    their_schedule: Schedule

    def __call__(self, call: Call) -> Call:
        parts = split_call(self.ours.model, call)
        prompts = [self.ours.prompt_of(parts, i) for i in range(len(parts.latent))]
        time = schedules.translate_time(self.schedule, self.their_schedule, parts.time)
        return self.theirs.build_call(parts.latent, time, prompts)


@dataclass(frozen=True)
class _PredictionConverter:
    """A prediction of the source -> the one in the target's terms."""

    model: nn.Module
    ours: Schedule
    theirs: Schedule

    def __call__(self, call: Call, prediction: Tensor) -> Tensor:
        parts = split_call(self.model, call)
        return schedules.convert_prediction(
            self.ours, self.theirs, parts.latent, parts.time, prediction
        )


@dataclass(frozen=True)
class _PredictionReader:
    """The prediction without the variance that some models (DiT, PixArt) predict as well."""

    channels: int

    def __call__(self, result: Any) -> Tensor:
        output = output_of(result)
        return output[:, : self.channels] if output.dim() == 4 else output
