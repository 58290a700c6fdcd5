"""A diffusers pipeline, run from noise to its end or first call.

The first call of its denoiser, that is.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...bases.folder import MODELS
from ...bases.pipeline_files import is_few_step_scheduler
from ...core.lowrank import LowRank
from ...errors import ProLoRAError, UnsupportedFormat
from ..kept_parts import hash_updates
from ..models import in_float32
from ..settings import FitSettings
from ..sides import Call
from ..swapping import BlockSwapping
from ..updates import FirstCallReached, temporary_hooks, with_lora
from .conditioning import (
    CallParts,
    PromptTable,
    build_call,
    conditioning_distance,
    sample_conditioning,
    split_call,
)
from .flow_convention import STEPS, observe_flow, watch_steps
from .latents import LatentSpace, capture_decoded, observe_latents
from .schedules import FLOW, NoiseSchedule
from .stages import PromptMemory, empty_weights, shrink_tiles


@dataclass(frozen=True)
class FinalSample:
    """One image that was sampled."""

    latent: Tensor  # after the last step [1, ...]
    first: Tensor  # the denoiser's input in the first step [1, ...]: noise, nearly alone
    times: list[Tensor]  # of all calls


class Pipeline:
    """A loaded pipeline.

    Attributes:
        pipe: the diffusers pipeline.
        name: for messages.
        denoiser: its unet or transformer.
        schedule: what the denoiser predicts, at which noise level.
        accepted: names of the parameters of the pipeline's call.
        memory: of its text encoders' answers; None for a pipeline with other users.
        swapping: of the denoiser's blocks, on a card whose memory is bounded.
        tile: pixels of the tiles that its VAE was asked to take; None: its own.
        few_steps: whether its size is that of few-step models alone.
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
            self._capture_call(prompt, settings)

    def release_encoders(self) -> None:
        """Frees the text encoders; their answers stay, and a new prompt reloads them.

        The text encoders of a pipeline with other users stay.
        """
        if self.memory is not None:
            self.memory.release()

    def release(self, keep_denoiser: bool) -> None:
        """Frees a fit's own pipeline after its last sampling."""
        if self.memory is not None:
            parts = (p for p in self.pipe.components.values() if isinstance(p, nn.Module))
            empty_weights(p for p in parts if not (keep_denoiser and p is self.denoiser))

    def move_to_card(self, device: str, room: int, tile: int | None) -> None:
        """Moves all to a card but the denoiser's blocks beyond `room` bytes.

        `tile` is the pixels of the tiles that the VAE takes; None leaves them.
        """
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module) and part is not self.denoiser:
                part.to(device)
        self.swapping, self.tile = BlockSwapping(self.denoiser, device), tile
        self.swapping.keep(room)
        if tile is not None:
            shrink_tiles(getattr(self.pipe, "vae", None), tile)

    def restore(self) -> None:
        """Reads again what `release` freed; text encoders come back when a prompt needs them."""
        if self.memory is not None:
            self.memory.restore()

    def derive_target_settings(self, settings: FitSettings) -> FitSettings:
        """Returns the settings of a target's sampling."""
        config = getattr(self.denoiser, "config", {})
        learnt = config.get("time_cond_proj_dim")
        scheduler = self.pipe.scheduler
        few = self.few_steps or learnt
        few = few or is_few_step_scheduler(type(scheduler).__name__, scheduler.config)
        return settings.for_target(bool(few), bool(learnt or config.get("guidance_embeds")))

    def sample_latents(
        self, prompt: str, settings: FitSettings, seed: int, output: str = "latent"
    ) -> Any:
        """Samples the latents of one image from noise; returns what the pipeline gives.

        `output` is "latent", or "pt" for pixels.
        """
        arguments = self._build_arguments(prompt, settings, seed, output)
        hook = self.denoiser.register_forward_pre_hook(_repeat_time, with_kwargs=True, prepend=True)
        with temporary_hooks([hook]), torch.no_grad():
            try:
                return self.pipe(**arguments)
            except (FirstCallReached, ProLoRAError):
                raise
            except Exception as error:  # diffusers and its models raise any type
                raise ProLoRAError(
                    f"{self.name}: its {type(self.pipe).__name__} cannot sample from the prompt "
                    f"{prompt!r} alone: {type(error).__name__}: {error}. If it takes "
                    "other prompts, give them as `prompts`"
                ) from error

    def sample_final(
        self, prompt: str, settings: FitSettings, seed: int, output: str = "latent"
    ) -> FinalSample:
        """Samples one image, and records its latents and the times of its calls.

        What a pipeline returns as latents is already denormalised in some (FLUX.2 klein), so the
        latents are taken from its scheduler. Arguments as for `sample_latents`; a sampling that
        `FirstCallReached` ends after its last step counts.
        """
        calls: list[CallParts] = []
        results: list[Tensor] = []

        def watch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            parts = split_call(model, Call(args, kwargs))
            latent = parts.latent[:0] if calls else parts.latent[:1].detach().clone()
            calls.append(CallParts(latent, parts.time.detach().cpu(), {}))

        hook = self.denoiser.register_forward_pre_hook(watch, with_kwargs=True)
        steps = watch_steps(self.pipe.scheduler, on_result=lambda x: results.append(x.detach()))
        with temporary_hooks([hook]), steps, suppress(FirstCallReached):
            self.sample_latents(prompt, settings, seed, output)
        if not results:
            raise UnsupportedFormat(
                f"{self.name}: its scheduler {type(self.pipe.scheduler).__name__} was never "
                "stepped, so its latents are not known"
            )
        # A guided DiT steps the same latents twice.
        return FinalSample(results[-1][:1], calls[0].latent, [parts.time for parts in calls])

    def _build_arguments(
        self, prompt: str, settings: FitSettings, seed: int, output: str = "latent"
    ) -> dict[str, Any]:
        """Builds the arguments of the pipeline's call that it accepts."""
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
        calls = [split_call(self.denoiser, self._capture_call(p, settings)) for p in prompts]
        if len(calls[0].latent) == 2:
            place = self._place_of_prompt(calls[0], prompts, settings)
            entries = [sample_conditioning(parts, place) for parts in calls]
            negative = sample_conditioning(calls[-1], 1 - place)
            return PromptTable(self.denoiser, [*entries, negative], calls[-1], guided=True)
        entries = [sample_conditioning(parts, 0) for parts in calls]
        branches = self._capture_branches(prompts[-1], settings)
        if max(len(branches), *(len(parts.latent) for parts in calls)) > 2:
            raise ProLoRAError(
                f"{self.name}: its {type(self.pipe).__name__} guides by more than two "
                "branches, which no fit can handle"
            )
        if len(branches) == 2:
            negative = sample_conditioning(branches[1], 0)
        else:
            empty = self._capture_call("", settings)
            negative = sample_conditioning(split_call(self.denoiser, empty), 0)
        guided = len(branches) == 2
        return PromptTable(self.denoiser, [*entries, negative], calls[-1], guided)

    def _place_of_prompt(
        self, parts: CallParts, prompts: Sequence[str], settings: FitSettings
    ) -> int:
        """Finds which sample of a guided call changes with the prompt.

        Most pipelines put the unconditional sample first, Z-Image the conditional one.
        """
        other = next((p for p in (*prompts, "") if p != prompts[0]), None)
        if other is None:
            return 1  # the empty prompt alone: most often both samples are the same
        changed = split_call(self.denoiser, self._capture_call(other, settings))
        distances = [
            conditioning_distance(sample_conditioning(parts, i), sample_conditioning(changed, i))
            for i in range(2)
        ]
        return int(distances[1] >= distances[0])

    def _capture_branches(self, prompt: str, settings: FitSettings) -> list[CallParts]:
        """Captures the denoiser's calls in the first step; some guide by several."""
        calls: list[CallParts] = []

        def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(split_call(model, Call(args, kwargs)))

        def stop(*_: Any) -> None:
            raise FirstCallReached

        hook = self.denoiser.register_forward_pre_hook(record, with_kwargs=True)
        steps = watch_steps(self.pipe.scheduler, stop)
        with temporary_hooks([hook]), steps, in_float32(self.denoiser), suppress(FirstCallReached):
            self.sample_latents(prompt, settings, 0)
        return calls

    def observe_schedule(self, settings: FitSettings) -> NoiseSchedule:
        """Returns the schedule; a flow's with its times and its sign."""
        if self.schedule.kind != FLOW:
            return self.schedule
        short = replace(settings, steps=STEPS)
        prompt = _prompts_or_empty(settings)[0]
        with in_float32(self.denoiser):
            return observe_flow(
                self.schedule,
                self.pipe.scheduler,
                self.denoiser,
                lambda: self.sample_latents(prompt, short, 0),
                self.name,
            )

    def observe_latents(self, settings: FitSettings, like: Tensor) -> LatentSpace:
        """Observes the latents on a sampling of two steps.

        `like` are latents [n, ...] as the denoiser is given them.
        """
        short = replace(settings, steps=2)
        prompt = _prompts_or_empty(settings)[0]
        final: list[Tensor] = []
        with in_float32(self.denoiser):
            given = capture_decoded(
                getattr(self.pipe, "vae", None),
                lambda: final.append(self.sample_final(prompt, short, 0, "pt").latent),
            )
        return observe_latents(self.pipe, like[:1], final[0], given, self.name)

    def _capture_call(self, prompt: str, settings: FitSettings) -> Call:
        """Captures the first call of the denoiser for a prompt."""
        calls: list[Call] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(Call(args, kwargs))
            raise FirstCallReached

        hook = self.denoiser.register_forward_pre_hook(stop, with_kwargs=True)
        with temporary_hooks([hook]), suppress(FirstCallReached):
            self.sample_latents(prompt, settings, 0)
        if not calls:
            raise ProLoRAError(
                f"{self.name}: its {type(self.pipe).__name__} never ran its denoiser"
            )
        return calls[0]


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


def _repeat_time(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeats a call's time for each sample, so that samples of many moments mix."""
    parts = split_call(model, Call(args, kwargs))
    if parts.time.dim():
        return args, kwargs
    call = build_call(model, replace(parts, time=parts.time.expand(len(parts.latent)).clone()))
    return call.args, call.kwargs


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

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part, found in by_encoder.items():
                stack.enter_context(with_lora(getattr(pipeline.pipe, part), found))
            yield

    memory = pipeline.memory if updates else None
    with enter() if memory is None else memory.under(hash_updates(updates), enter):
        yield
