"""Probing by images in a world of the study: what the library does for a target of few steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from crossing import flow_schedule
from flow import sample
from guiding import guide_source
from torch import Tensor, nn
from worlds import World

from prolora.adapters.adapter import Adapter
from prolora.probe import Guidance
from prolora.probe.pipelines.conditioning import CallParts, PromptTable
from prolora.probe.pipelines.crossing import CrossedTranslation, CrossingSide
from prolora.probe.pipelines.crossing_recorder import CrossingRecorder
from prolora.probe.pipelines.latents import SharedLatents
from prolora.probe.pipelines.layouts import LatentLayout
from prolora.probe.settings import FEW_STEPS, FitSettings

if TYPE_CHECKING:
    from probing import Case


class Painted:
    """What a recorder needs of a pipeline: the model, its name, and the guidance of its samples."""

    def __init__(self, model: nn.Module, name: str, guidance: float) -> None:
        self.denoiser, self.name, self.guidance = model, name, guidance


@dataclass(frozen=True)
class WorldRecorder(CrossingRecorder):
    """Samples all images at once: a pipeline would take one after the other.

    Attributes:
        world: of both models.
        guidance: that the source is asked with.
    """

    world: World = field(kw_only=True)
    guidance: Guidance | None = None

    @cached_property
    def translation(self) -> CrossedTranslation:
        """As between pipelines."""
        sides = {"ours": self.ours, "theirs": self.theirs}
        return CrossedTranslation(read=self.theirs.read, guidance=self.guidance, **sides)

    def _sample(self, side: CrossingSide, seed: int, origin: str) -> dict[str, Tensor]:
        painted, settings = side.pipeline, side.settings
        numbers = [int(prompt) for prompt in settings.prompts]
        y = torch.tensor([numbers[(seed + i) % len(numbers)] for i in range(settings.images)])
        with torch.no_grad():
            tokens, null = (
                self.world.tokens(painted.denoiser, prompts)
                for prompts in (y, self.world.null_like(y))
            )
        steps, guidance = settings.steps, painted.guidance
        latents = sample(painted.denoiser, tokens, null, self.world.shape, steps, guidance, seed)
        noises = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        times = torch.linspace(1000, 0, steps + 1)[:-1]
        return {"latents": latents, "noises": noises, "levels": side.schedule.level_at(times)}


def record_images(case: Case, images: int, steps: int) -> WorldRecorder:
    """The recorder of a case: prompts are those that a user of the LoRA would give.

    Args:
        case: one LoRA and one target.
        images: of each origin.
        steps: of the source; the target takes FEW_STEPS.
    """
    world, prefix = case.world, case.world.prefix[case.arch]
    generator = torch.Generator().manual_seed(case.seed)
    y = world.draw_prompts(2 * images, generator, case.adapter == "concept")
    settings = FitSettings(tuple(str(int(k)) for k in y), images=images, steps=steps)
    few = replace(settings, steps=FEW_STEPS)
    known = torch.tensor([*y.tolist(), world.null_prompt])
    sides = []
    for model, asked, guidance in (
        (case.source, settings, world.guidance),
        (case.target, few, world.guidance_of(case.kind)),
    ):
        with torch.no_grad():
            tokens = world.tokens(model, known)
        entries = [{("tokens",): row[None]} for row in tokens]
        like = CallParts(torch.zeros(25, *world.shape), torch.zeros(25), entries[0])
        painted = Painted(model, case.arch, guidance)
        table, space = PromptTable(model, entries, like), SharedLatents(LatentLayout("image"))
        size = (world.shape[1], world.shape[2])
        sides.append(CrossingSide(painted, asked, flow_schedule(), table, space, size))
    lora = Adapter({prefix + n: u for n, u in case.lora.items()}, format="diffusers")
    guided = guide_source(world, case.source, case.kind, case.adapter)
    return WorldRecorder(*sides, lora, world=world, guidance=guided)
