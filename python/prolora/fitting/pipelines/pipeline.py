"""A diffusers pipeline that samples, and is observed."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...bases.folder import MODELS
from ...core.lowrank import LowRank
from ...errors import ProLoRAError, UnsupportedFormat
from ..kept_parts import hash_updates
from ..models import in_float32
from ..settings import FitSettings
from ..swapping import BlockSwapping
from ..updates import with_lora
from .conditioning import (
    CallParts,
    PromptTable,
    conditioning_distance,
    sample_conditioning,
)
from .latents import LatentSpace, observe_latents
from .memory_bounds import shrink_tiles
from .prompt_memory import PromptMemory, empty_weights
from .schedules import FLOW, NoiseSchedule
from .watching import FLOW_STEPS, Sampling, SamplingEnded, Until, read_flow, watch_sampling


class Pipeline:
    """A loaded pipeline.

    Attributes:
        pipe: the diffusers pipeline.
        name: for messages.
        denoiser: its unet or transformer.
        schedule: what the denoiser predicts, at which noise level.
        accepted: names of the parameters of the pipeline's call.
        memory: of its text encoders' answers; None where these always run.
        swapping: of the denoiser's blocks, on a card whose memory is bounded.
        tile: pixels of the tiles that its VAE was asked to take; None: its own.
        few_steps: whether its files say that it draws in few steps.
    """

    def __init__(self, pipe: Any, name: str, memory: PromptMemory | None = None) -> None:
        """Wraps a diffusers pipeline; `name` is for messages."""
        self.pipe, self.name, self.memory = pipe, name, memory
        part = next((part for part in MODELS if getattr(pipe, part, None) is not None), None)
        if part is None:
            raise UnsupportedFormat(f"{name}: its {type(pipe).__name__} has no unet or transformer")
        self.denoiser: nn.Module = getattr(pipe, part)
        self.schedule = NoiseSchedule.of(pipe.scheduler, name)
        self.swapping: BlockSwapping | None = None
        self.tile: int | None = None
        self.few_steps = False
        self.accepted = inspect.signature(type(pipe).__call__).parameters
        if "prompt" not in self.accepted:
            raise UnsupportedFormat(
                f"{name}: its {type(pipe).__name__} takes no prompt, from which a fit samples"
            )
        pipe.set_progress_bar_config(disable=True)

    @property
    def size(self) -> int | None:
        """Default height in pixels; None where the pipeline does not say."""
        if "height" not in self.accepted:
            return None
        config: Any = self.denoiser.config
        sample = getattr(config, "sample_size", None)
        sample = getattr(self.pipe, "default_sample_size", sample)
        sample = sample[0] if isinstance(sample, list | tuple) else sample
        scale = getattr(self.pipe, "vae_scale_factor", None)
        return sample * scale if isinstance(sample, int) and isinstance(scale, int) else None

    def encode_prompts(self, settings: FitSettings) -> None:
        """Encodes all prompts of the samplings, with and without the LoRA, and the empty one."""
        for prompt in dict.fromkeys((*_prompts_or_empty(settings), "")):
            self.capture_call(prompt, settings)

    @property
    def models(self) -> dict[str, nn.Module]:
        """All of its models by name."""
        parts = self.pipe.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module)}

    def free(self, keeps_denoiser: bool = False) -> None:
        """Frees the memory of models that do not run again."""
        parts = self.models.values()
        empty_weights(part for part in parts if not (keeps_denoiser and part is self.denoiser))

    def move_beside_denoiser(self, device: torch.device | str) -> None:
        """Moves all models but the denoiser."""
        for part in self.models.values():
            if part is not self.denoiser:
                part.to(device)

    def move_to_card(self, device: str, room: int, tile: int | None) -> None:
        """Moves all to a card but the denoiser's blocks beyond `room` bytes.

        `tile` is the pixels of the tiles that the VAE takes; None leaves them.
        """
        self.move_beside_denoiser(device)
        self.swapping, self.tile = BlockSwapping(self.denoiser, device), tile
        self.swapping.keep(room)
        if tile is not None:
            shrink_tiles(getattr(self.pipe, "vae", None), tile)

    def derive_target_settings(self, settings: FitSettings) -> FitSettings:
        """Returns the settings of a target's sampling."""
        config = getattr(self.denoiser, "config", {})
        embeds = config.get("time_cond_proj_dim") or config.get("guidance_embeds")
        return settings.for_target(self.few_steps, bool(embeds))

    def sample_latents(
        self, prompt: str, settings: FitSettings, seed: int, output: str = "latent"
    ) -> Any:
        """Samples the latents of one image from noise; returns what the pipeline gives.

        `output` is "latent", or "pt" for pixels.
        """
        arguments = self._build_arguments(prompt, settings, seed, output)
        try:
            with torch.no_grad():
                return self.pipe(**arguments)
        except (SamplingEnded, ProLoRAError):
            raise
        except Exception as error:  # diffusers and its models raise any type
            raise ProLoRAError(
                f"{self.name}: its {type(self.pipe).__name__} cannot sample from the prompt "
                f"{prompt!r} alone: {type(error).__name__}: {error}. If it takes "
                "other prompts, give them as `prompts`"
            ) from error

    def sample_final(
        self, prompt: str, settings: FitSettings, seed: int, output: str = "latent"
    ) -> Sampling:
        """Samples one image, watched to its last latents; arguments as for `sample_latents`.

        What a pipeline returns as latents is already denormalised in some (FLUX.2 klein), so they
        are taken from its scheduler.
        """
        with watch_sampling(self.denoiser, self.pipe.scheduler) as seen:
            self.sample_latents(prompt, settings, seed, output)
        if not seen.latents:
            raise UnsupportedFormat(
                f"{self.name}: its scheduler {type(self.pipe.scheduler).__name__} was never "
                "stepped, so its latents are not known"
            )
        return seen

    def observe(self, prompt: str, settings: FitSettings, until: Until) -> Sampling:
        """Watches a sampling in float32, from noise of seed 0."""
        with (
            in_float32(self.denoiser),
            watch_sampling(self.denoiser, self.pipe.scheduler, until) as seen,
        ):
            self.sample_latents(prompt, settings, 0)
        return seen

    def capture_call(self, prompt: str, settings: FitSettings) -> CallParts:
        """Captures the first call of the denoiser for a prompt, which does not run."""
        with watch_sampling(self.denoiser, self.pipe.scheduler, "call") as seen:
            self.sample_latents(prompt, settings, 0)
        if not seen.calls:
            raise ProLoRAError(
                f"{self.name}: its {type(self.pipe).__name__} never ran its denoiser"
            )
        return seen.calls[0]

    def _build_arguments(
        self, prompt: str, settings: FitSettings, seed: int, output: str = "latent"
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "prompt": prompt,
            "num_inference_steps": settings.steps,
            "output_type": output,
            "generator": torch.Generator().manual_seed(seed),
            "height": settings.size,
            "width": settings.size,
            "guidance_scale": settings.guidance,
            "use_resolution_binning": False,
            "clean_caption": False,
        }
        return {k: v for k, v in arguments.items() if k in self.accepted and v is not None}

    def tabulate_prompts(self, settings: FitSettings) -> PromptTable:
        """Tabulates each prompt's conditioning from the first call of a sampling.

        The unconditional branch of the guidance comes last; without guidance, the empty prompt.
        """
        prompts = _prompts_or_empty(settings)
        calls = [self.capture_call(prompt, settings) for prompt in prompts]
        if len(calls[0].latent) == 2:
            place = self._place_of_prompt(calls[0], prompts, settings)
            entries = [sample_conditioning(parts, place) for parts in calls]
            negative = sample_conditioning(calls[-1], 1 - place)
            return PromptTable(self.denoiser, [*entries, negative], calls[-1], guided=True)
        entries = [sample_conditioning(parts, 0) for parts in calls]
        branches = self.observe(prompts[-1], settings, "step").calls  # some guide by several calls
        if max(len(branches), *(len(parts.latent) for parts in calls)) > 2:
            raise ProLoRAError(
                f"{self.name}: its {type(self.pipe).__name__} guides by more than two "
                "branches, which no fit can handle"
            )
        guided = len(branches) == 2
        free = branches[1] if guided else self.capture_call("", settings)
        entries.append(sample_conditioning(free, 0))
        return PromptTable(self.denoiser, entries, calls[-1], guided)

    def _place_of_prompt(
        self, parts: CallParts, prompts: Sequence[str], settings: FitSettings
    ) -> int:
        """Finds which sample of a guided call changes with the prompt.

        Most pipelines put the unconditional sample first, Z-Image the conditional one.
        """
        other = next((p for p in (*prompts, "") if p != prompts[0]), None)
        if other is None:
            return 1  # the empty prompt alone: most often both samples are the same
        changed = self.capture_call(other, settings)
        distances = [
            conditioning_distance(sample_conditioning(parts, i), sample_conditioning(changed, i))
            for i in range(2)
        ]
        return int(distances[1] >= distances[0])

    def observe_schedule(self, settings: FitSettings) -> NoiseSchedule:
        """Returns the schedule; a flow's with its times and its sign."""
        if self.schedule.kind != FLOW:
            return self.schedule
        short, prompt = replace(settings, steps=FLOW_STEPS), _prompts_or_empty(settings)[0]
        return read_flow(self.schedule, self.observe(prompt, short, "end").steps, self.name)

    def observe_latents(self, settings: FitSettings, like: Tensor) -> LatentSpace:
        """Observes the latents on a sampling of two steps.

        `like` are latents [n, ...] as the denoiser is given them.
        """
        short, prompt = replace(settings, steps=2), _prompts_or_empty(settings)[0]
        vae, given = getattr(self.pipe, "vae", None), list[Tensor]()

        def stop(latent: Tensor, *_: Any, **__: Any) -> None:
            given.append(latent.detach())
            raise SamplingEnded

        if vae is not None:
            vae.decode = stop
        try:
            with in_float32(self.denoiser):
                final = self.sample_final(prompt, short, 0, "pt").latents[-1][:1]
        finally:
            if vae is not None:
                del vae.decode
        return observe_latents(self.pipe, like[:1], final, given[0] if given else None, self.name)


def share_size(settings: FitSettings, *pipelines: Pipeline) -> FitSettings:
    """Fills in a size where none is asked: the smallest default."""
    known = [pipeline.size for pipeline in pipelines if pipeline.size is not None]
    return replace(settings, size=settings.size or min(known, default=None))


def describe_pipeline(pipeline: Pipeline, settings: FitSettings) -> str:
    """Describes a sampler in a text: part of the keys of kept samplings.

    The pipeline's files belong to what all of them depend on.
    """
    dtype = str(next(pipeline.denoiser.parameters()).dtype)
    return json.dumps([settings.describe_samples(), dtype, pipeline.tile])


def _prompts_or_empty(settings: FitSettings) -> tuple[str, ...]:
    return settings.prompts or ("",)


_INNER = "text_model."
"""What the module names of CLIP's text models start with in files, and no longer in memory."""


@contextlib.contextmanager
def run_text_encoders_beside(pipeline: Pipeline, updates: Mapping[str, LowRank]) -> Iterator[None]:
    """Runs a pipeline's text encoders with updates beside their weights.

    The names of the updates begin with the text encoder's.
    """
    by_encoder: dict[str, dict[str, LowRank]] = {}
    for name, update in updates.items():
        part, _, inner = name.partition(".")
        encoder = getattr(pipeline.pipe, part, None)
        if encoder is None:
            raise ProLoRAError(f"{pipeline.name}: it has no {part}, which the LoRA has {name} of")
        modules = dict(encoder.named_modules())
        known = inner if inner in modules else inner.removeprefix(_INNER)
        by_encoder.setdefault(part, {})[known] = update

    memory = pipeline.memory if updates else None
    with contextlib.ExitStack() as stack:
        if memory is not None:
            stack.enter_context(memory.under(hash_updates(updates)))
        for part, found in by_encoder.items():
            if memory is None or not memory.is_freed:
                stack.enter_context(with_lora(getattr(pipeline.pipe, part), found))
        yield
