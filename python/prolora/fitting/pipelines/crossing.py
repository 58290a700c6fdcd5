"""Two pipelines that are asked about the same images.

They are asked at the same noise level. Most of them have different latents. A flow and a model of
another path with one VAE are asked in the same way, with the same noise and nothing to decode
(`LatentSpace.shared`).

A latent of one VAE is noise to a model of another, so a recorded call means nothing to the other
model. The images do: the final latents of every sampling are decoded by their VAE and encoded by
the other. Each model then sees its latent of one image, with noise of its own at equal log-SNR. The
change of x₀ that the LoRA makes crosses in the same way (docs/fit.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.lowrank import LowRank
from ..recording.trajectories import Call
from ..recording.translation import Question, Read, Translate, Translation, same_call
from ..settings import FitSettings
from .conditioning import PromptTable, make_reader, split_call
from .guidance import guide_source
from .latents import LatentLayout, LatentSpace, check_shapes, check_shown
from .pipeline import NO_UPDATES, FinalSample, Pipeline, run_text_encoders_beside, share_size
from .schedules import NoiseSchedule, align_rows


@dataclass(frozen=True)
class CrossingSide:
    """One of the two pipelines."""

    pipeline: Pipeline  # loaded
    settings: FitSettings  # with its size
    schedule: NoiseSchedule  # of its denoiser, a flow's with its times
    table: PromptTable  # its conditioning for each prompt
    space: LatentSpace  # its latents
    pixels: tuple[int, int]  # height and width of its images

    @classmethod
    def of(cls, pipeline: Pipeline, settings: FitSettings, shared: bool = False) -> CrossingSide:
        """Observes a pipeline on a few short samplings.

        `settings` without a size take the pipeline's; `shared` says that the other side denoises
        the same latents.
        """
        settings = replace(settings, size=settings.size or pipeline.size)
        table = pipeline.tabulate_prompts(settings)
        if shared:
            layout = LatentLayout.of(pipeline.pipe, table.like.latent)
            space = LatentSpace(None, layout, shared=True)
        else:
            space = pipeline.observe_latents(settings, table.like.latent)
        height, width = space.decode(table.like.latent[:1]).shape[-2:]
        schedule = pipeline.observe_schedule(settings)
        return cls(pipeline, settings, schedule, table, space, (height, width))

    @cached_property
    def read(self) -> Read:
        """Return value of the denoiser -> its prediction."""
        return make_reader(self.table.like.latent)

    def build_call(self, clean: Tensor, noise: Tensor, level: Tensor, prompts: list[int]) -> Call:
        """Builds the call at the state a·x₀ + b·ε of noise levels [n]."""
        a, b = (align_rows(part, clean) for part in self.schedule.scales(level))
        time = self.schedule.time_at(level).to(clean.device)
        return self.table.build_call((a * clean + b * noise).to(clean), time, prompts)

    def read_noise(self, final: FinalSample) -> Tensor:
        """Reads the ε [1, ...] of an image's first state a·x₀ + b·ε."""
        level = self.schedule.level_at(final.times[0]).flatten()[:1]
        a, b = (align_rows(part, final.first) for part in self.schedule.scales(level))
        clean = self.space.as_latent(self.space.as_image(final.latent)).to(final.first)
        return (final.first - a * clean) / b

    def read_clean(self, call: Call, prediction: Tensor) -> Tensor:
        """Reads the x₀ in a prediction f = c·x₀ + d·x at a call."""
        parts = split_call(self.pipeline.denoiser, call)
        c, d = self._weights(parts.time, prediction)
        return (prediction - d * parts.latent) / c

    def predict_clean(self, call: Call, clean: Tensor) -> Tensor:
        """Returns the prediction f = c·x₀ + d·x at a call for an x₀."""
        parts = split_call(self.pipeline.denoiser, call)
        c, d = self._weights(parts.time, clean)
        return c * clean + d * parts.latent

    def _weights(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        c, d = self.schedule.weights(self.schedule.level_at(time))
        return align_rows(c, like), align_rows(d, like)


@dataclass(frozen=True)
class CrossedTranslation(Translation):
    """The source's predictions in the target's terms, by way of images.

    Each image is the x₀ of a prediction.
    """

    ours: CrossingSide = field(kw_only=True)  # the source
    theirs: CrossingSide = field(kw_only=True)  # the target

    @classmethod
    def of(
        cls, ours: CrossingSide, theirs: CrossingSide, text: Mapping[str, LowRank] = NO_UPDATES
    ) -> CrossedTranslation:
        """Makes the translation between two sides; `read` is the target's.

        `text` are the LoRA's updates of the source's text encoders.
        """
        guidance = guide_source(
            (ours.pipeline, theirs.pipeline),
            (ours.settings, theirs.settings),
            (ours.table, theirs.table),
        )
        adapt: Translate = same_call
        if text:
            with run_text_encoders_beside(ours.pipeline, text):
                adapted = ours.pipeline.tabulate_prompts(ours.settings)
            adapt = partial(ours.table.swap_prompts, adapted)
        return cls(read=theirs.read, guidance=guidance, adapt=adapt, ours=ours, theirs=theirs)

    def of_source(self, model: nn.Module, question: Question, adapted: bool = False) -> Tensor:
        """Implements `Translation.of_source` with the x₀ moved as pixels."""
        prediction = self.ask_source(model, question.source, self.ours.read, adapted)
        clean = self.ours.read_clean(question.source, prediction)
        crossed = cross_clean(self.ours, self.theirs, clean)
        return self.theirs.predict_clean(question.target, crossed)

    def of_clean(self, call: Call) -> Tensor:
        """Implements `Translation.of_clean` with the target's x₀ of the call."""
        assert call.clean is not None
        return self.theirs.predict_clean(call, call.clean)

    @property
    def same_noise(self) -> bool:
        """See `Translation.same_noise`."""
        return self.ours.space.shared


def cross_clean(ours: CrossingSide, theirs: CrossingSide, latent: Tensor) -> Tensor:
    """Moves latents [n, ...] to the other side by their pixels."""
    pixels, size = ours.space.decode(latent), theirs.pixels
    if tuple(pixels.shape[-2:]) != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    return theirs.space.encode(pixels)


def observe_sides(
    source: Pipeline, target: Pipeline, settings: FitSettings, shared: bool
) -> tuple[CrossingSide, CrossingSide]:
    """Observes both sides of a crossing.

    Without a size each side has its pipeline's, or both the smaller one where they share latents.
    """
    if shared:
        settings = share_size(settings, source, target)
    else:
        check_shown(source.pipe, source.name)
        check_shown(target.pipe, target.name)
    ours = CrossingSide.of(source, settings, shared)
    theirs = CrossingSide.of(target, target.derive_target_settings(settings), shared)
    if shared:
        latents = ours.table.like.latent, theirs.table.like.latent
        layouts = ours.space.layout, theirs.space.layout
        check_shapes(latents, layouts, (source.name, target.name))
    return ours, theirs


def takes_few_steps(of_source: FitSettings, of_target: FitSettings) -> bool:
    """Returns whether the target takes half the source's steps, or fewer."""
    return 2 * of_target.steps <= of_source.steps


def draw_noise(
    sides: tuple[CrossingSide, CrossingSide],
    pair: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draws noise for each side's latent of an image: equal for shared latents."""
    spaces = tuple(side.space for side in sides)
    if spaces[0].shared:
        shape = spaces[0].as_image(pair[0]).shape
        noise = torch.randn(shape, generator=generator).to(pair[0])
        return spaces[0].as_latent(noise), spaces[1].as_latent(noise).to(pair[1])
    ours, theirs = (torch.randn(x.shape, generator=generator).to(x) for x in pair)
    return ours, theirs
