"""A diffusers pipeline as a side of a fit."""

from __future__ import annotations

import logging
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
from .latents import LatentSpace, check_shapes, check_shown, recognise_layout
from .pipeline import Pipeline, describe_pipeline, run_text_encoders_beside, share_size
from .schedules import FLOW
from .watching import read_guidance_scale

log = logging.getLogger(__name__)

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
            layout = recognise_layout(pipeline.pipe, like)
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
    if shared:
        latents = ours.table.like.latent, theirs.table.like.latent
        check_shapes((ours.space, theirs.space), latents, (ours.name, theirs.name))
    few = 2 * theirs.settings.steps <= ours.settings.steps
    mixed = (ours.schedule.kind == FLOW) != (theirs.schedule.kind == FLOW)
    asking = Asking(
        ours,
        theirs,
        lora.denoiser,
        guidance=_guide_source(ours, theirs),
        look=settings.look_of_source,
        pairs=not shared or mixed or few,
        few=few,
        keys=_hash_origins(ours, theirs, lora),
    )
    return theirs, asking


def observe_guidance(side: PipelineSide) -> float | None:
    """Observes the g of v = u + g·(c − u) in the scheduler's input.

    Returns 1 without guidance, and where the prompt changes nothing; None where the scheduler is
    given no such sum.
    """
    prompt = next((prompt for prompt in side.settings.prompts if prompt), "")
    steps = side.pipeline.observe(prompt, side.settings, "step").steps
    if not steps:
        return None
    with_prompt, without = list[Tensor](), list[Tensor]()
    for parts, output in steps[0].calls:
        for i, row in enumerate(side.read(output).double().cpu()):
            branch = with_prompt if side.table.has_prompt(parts, i) else without
            branch.append(row.flatten())
    return read_guidance_scale(side.read(steps[0].given).double().cpu(), with_prompt, without)


def _lacks_negative_prompt(side: PipelineSide) -> bool:
    """Returns whether a pipeline guides only with a negative prompt, which is never given.

    Qwen-Image is such a pipeline: its second scale is above 1 unless it is told otherwise, and
    FLUX's is not. A student of such a model is one whose guidance scale was asked to be none.
    """
    second = side.pipeline.accepted.get("true_cfg_scale")
    usual = second.default if second else None
    if not isinstance(usual, int | float) or usual <= 1:
        return False
    return side.settings.guidance is None or side.settings.guidance > 1


def _guide_source(source: PipelineSide, target: PipelineSide) -> float:
    """Returns the scale of the source's guidance where the target runs without any; else 1.

    Few-step students, and students that learnt their guidance, predict what their teacher does with
    guidance: v = u + g·(c − u), with c for the prompt and u for none. So the change that they
    should make is the guided prediction's, and that of c alone is too small by a factor of about g.
    """
    if not source.table.guided or target.table.guided or _lacks_negative_prompt(target):
        return 1.0
    scale = observe_guidance(source)
    if scale is None:
        log.warning(
            "%s: what its guidance makes of the predictions with and without the prompt is not a "
            "sum of both, so it is asked without, although %s is run without guidance",
            source.name,
            target.name,
        )
    return scale or 1.0


def _hash_origins(ours: PipelineSide, theirs: PipelineSide, lora: LoraParts) -> dict[str, str]:
    """Hashes what each origin's images depend on, beside seed and files."""
    plain = hash_texts(
        *(describe_pipeline(side.pipeline, side.settings) for side in (ours, theirs)),
        hash_updates(lora.carried),
    )
    adapted = hash_texts(plain, hash_updates({**lora.denoiser, **lora.text}))
    return {"source": plain, "adapted": adapted, "target": plain}
