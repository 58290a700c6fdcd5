"""A diffusers pipeline as a side of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from ...errors import ProLoRAError
from ..fit_plan import LoraParts
from ..kept_parts import hash_texts, hash_updates
from ..probes import Asking
from ..settings import FitSettings
from ..sides import Call, FitSide, Image
from .conditioning import make_reader, stack_conditionings
from .guidance import guide_source
from .latents import LatentLayout, LatentSpace, check_shapes, check_shown
from .pipeline import Pipeline, describe_pipeline, run_text_encoders_beside, share_size
from .schedules import FLOW

_NUMBERS = 16384
"""Of the latents of one call, at least: calls of small models take as long for one sample."""


class PipelineSide(FitSide):
    """A pipeline, observed on a few short samplings.

    Attributes:
        pipeline: loaded.
        settings: of its sampler, with its size.
        table: its conditioning for each prompt; `adapted`, that with the LoRA.
        text: the LoRA's updates of its text encoders, which run where the LoRA does.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: FitSettings,
        shared: bool,
        text: Mapping[str, LowRank] | None = None,
    ) -> None:
        """Observes the pipeline; `shared` says that the other side denoises the same latents.

        `settings` without a size take the pipeline's.
        """
        self.pipeline, self.name, self.text = pipeline, pipeline.name, text or {}
        self.denoiser = pipeline.denoiser
        self.settings = settings = replace(settings, size=settings.size or pipeline.size)
        self.table = self.adapted = pipeline.tabulate_prompts(settings)
        if self.text:
            with run_text_encoders_beside(pipeline, self.text):
                self.adapted = pipeline.tabulate_prompts(settings)
        like = self.table.like.latent
        if shared:
            layout = LatentLayout.of(pipeline.pipe, like)
            self.space = LatentSpace(None, layout, shared=True)
        else:
            self.space = pipeline.observe_latents(settings, like)
            height, width = self.space.decode(like[:1]).shape[-2:]
            self.pixels = height, width
        self.schedule = pipeline.observe_schedule(settings)
        self.prompts = max(len(settings.prompts), 1)
        self._read = make_reader(like)
        self.at_once = max(len(like), min(16, _NUMBERS // like[0].numel()))
        try:
            stack_conditionings(self.table.entries)
        except ProLoRAError:  # the texts of two prompts differ in length
            self.at_once = 1

    def sample(self, number: int, prompt: int) -> Image:
        """Implements `FitSide.sample`."""
        text = (self.settings.prompts or ("",))[prompt]
        seen = self.pipeline.sample_final(text, self.settings, number)
        # A guided DiT steps the same latents twice.
        first, latent = seen.calls[0].latent[:1], seen.latents[-1][:1]
        levels = torch.cat([self.schedule.level_at(call.time).flatten() for call in seen.calls])
        clean = self.space.as_latent(self.space.as_image(latent)).to(first)
        a, b = (float(part) for part in self.schedule.scales(levels[0]))
        return Image(latent, (first - a * clean) / b, levels)

    def build_call(
        self, state: Tensor, level: Tensor, prompts: Sequence[int], adapted: bool = False
    ) -> Call:
        """Implements `FitSide.build_call`."""
        table = self.adapted if adapted else self.table
        device = self.table.like.latent.device
        time = self.schedule.time_at(level).to(device)
        return table.build_call(state.to(device), time, prompts)

    def read(self, result: Any) -> Tensor:
        """Implements `FitSide.read`."""
        return self._read(result)

    def run_text_encoders(self) -> AbstractContextManager[None]:
        """Implements `FitSide.run_text_encoders`."""
        return run_text_encoders_beside(self.pipeline, self.text)


def ask_pipelines(
    source: Pipeline, target: Pipeline, settings: FitSettings, lora: LoraParts, shared: bool
) -> tuple[PipelineSide, Asking]:
    """Observes both sides of a fit: the target, and how both are asked.

    Without a size each side has its pipeline's, or both the smaller one where they share latents.
    Pairs of images help across latents, between a flow and another path, and for a target of few
    steps; elsewhere they cost 0.04 to 0.1 (docs/results.md).
    """
    if shared:
        settings = share_size(settings, source, target)
    else:
        check_shown(source.pipe, source.name)
        check_shown(target.pipe, target.name)
    ours = PipelineSide(source, settings, shared, lora.text)
    theirs = PipelineSide(target, target.derive_target_settings(settings), shared)
    tables = ours.table, theirs.table
    if shared:
        latents = tables[0].like.latent, tables[1].like.latent
        check_shapes(latents, (ours.space.layout, theirs.space.layout), (ours.name, theirs.name))
    few = 2 * theirs.settings.steps <= ours.settings.steps
    mixed = (ours.schedule.kind == FLOW) != (theirs.schedule.kind == FLOW)
    asking = Asking(
        ours,
        theirs,
        lora.denoiser.updates,
        guidance=guide_source((source, target), (ours.settings, theirs.settings), tables),
        look=settings.look_of_source,
        pairs=not shared or mixed or few,
        few=few,
        keys=_hash_origins(ours, theirs, lora),
    )
    return theirs, asking


def _hash_origins(ours: PipelineSide, theirs: PipelineSide, lora: LoraParts) -> dict[str, str]:
    """Hashes what each origin's images depend on, beside seed and files."""
    plain = hash_texts(
        *(describe_pipeline(side.pipeline, side.settings) for side in (ours, theirs)),
        hash_updates(lora.carried),
    )
    adapted = hash_texts(plain, hash_updates({**lora.denoiser.updates, **lora.text}))
    return {"source": plain, "adapted": adapted, "target": plain}
